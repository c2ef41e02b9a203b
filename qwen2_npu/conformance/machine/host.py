"""Whether the host can be trusted to launch on time: cores pinned, clocks at their top, nobody else on them.

What the kernel does not say (a virtual machine has no cpufreq) is not a warning: it stands as None in the fingerprint.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys/devices/system")

LOWEST_FREQUENCY = 0.8
"""Of its maximum, for the fastest of the process's cores after a run: below it the host was throttled or
saving power."""

NODES = 1
"""NUMA nodes that the process's cores may span: a thread that moves between nodes leaves its memory behind."""

PREEMPTIONS_PER_SECOND = 50.0
"""Involuntary context switches of this process: others are running on its cores."""


@dataclass(frozen=True)
class Host:
    """The host as the kernel shows it now.

    Attributes:
        affinity: cores this process may use.
        governors: the frequency governors of those cores; empty where there is no cpufreq.
        frequency: of the fastest of those cores, as a part of its maximum; None where the kernel does not say.
        nodes: NUMA nodes those cores belong to.
        preemptions: involuntary context switches of this process so far.
        seconds: the clock at which all this was read.
    """

    affinity: frozenset[int]
    governors: frozenset[str]
    frequency: float | None
    nodes: int
    preemptions: int
    seconds: float

    @classmethod
    def read(cls, sys: Path = SYS, affinity: Iterable[int] | None = None) -> Host:
        """Args:
        sys: /sys/devices/system, or a copy of it.
        affinity: default: of this process.
        """
        cores = frozenset(os.sched_getaffinity(0) if affinity is None else affinity)
        frequencies = [sys / "cpu" / f"cpu{core}" / "cpufreq" for core in sorted(cores)]
        governors = {_text(folder / "scaling_governor") for folder in frequencies}
        ratios = [
            current / most
            for folder in frequencies
            if (current := _number(folder / "scaling_cur_freq")) and (most := _number(folder / "cpuinfo_max_freq"))
        ]
        nodes = [_cores(_text(path) or "") for path in sorted(sys.glob("node/node[0-9]*/cpulist"))]
        return cls(
            affinity=cores,
            governors=frozenset(name for name in governors if name),
            frequency=max(ratios, default=None),
            nodes=sum(bool(node & cores) for node in nodes) or 1,
            preemptions=resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
            seconds=time.monotonic(),
        )

    @property
    def affinity_text(self) -> str:
        """``0-23,48``."""
        spans: list[list[int]] = []
        for core in sorted(self.affinity):
            if spans and core == spans[-1][1] + 1:
                spans[-1][1] = core
            else:
                spans.append([core, core])
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)

    @property
    def governor(self) -> str | None:
        return ",".join(sorted(self.governors)) or None

    def warnings_since(self, before: Host) -> tuple[str, ...]:
        """What went beyond a bound between ``before`` and now, with the way out."""
        found = []
        other = self.governors - {"performance"}
        if other:
            found.append(
                f"frequency governor {', '.join(sorted(other))}: set performance (cpupower frequency-set -g "
                "performance)"
            )
        if self.frequency is not None and self.frequency < LOWEST_FREQUENCY:
            found.append(
                f"the fastest core runs at {self.frequency:.0%} of its maximum, below {LOWEST_FREQUENCY:.0%}: "
                "throttled, or saving power"
            )
        if self.nodes > NODES:
            found.append(
                f"the process may run on {self.nodes} NUMA nodes (cores {self.affinity_text}): pin it to one (numactl "
                "-N 0, or taskset)"
            )
        elapsed = max(self.seconds - before.seconds, 1.0)  # a handful within a short run says nothing
        rate = (self.preemptions - before.preemptions) / elapsed
        if rate > PREEMPTIONS_PER_SECOND:
            found.append(
                f"{rate:.0f} involuntary context switches per second, above {PREEMPTIONS_PER_SECOND:.0f}: something "
                "else runs on these cores"
            )
        return tuple(found)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdigit() else None


def _cores(cpulist: str) -> set[int]:
    """``0-3,8`` -> {0, 1, 2, 3, 8}."""
    cores: set[int] = set()
    for part in cpulist.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cores.update(range(int(first), int(last or first) + 1))
    return cores
