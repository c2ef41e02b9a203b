"""Host warnings from a copy of /sys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen2_npu.conformance.machine.host import Host


def fake_sys(root: Path, *, governor: str = "performance", frequency: int = 2_600_000, nodes: int = 2) -> Path:
    for core in range(4):
        folder = root / "cpu" / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
        (folder / "scaling_cur_freq").write_text(f"{frequency}\n")
        (folder / "cpuinfo_max_freq").write_text("2600000\n")
    for node in range(nodes):
        folder = root / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{node * 2}-{node * 2 + 1}\n")
    return root


def test_a_pinned_quiet_host_has_no_warnings(tmp_path: Path) -> None:
    host = Host.read(fake_sys(tmp_path), affinity=(0, 1))
    assert (host.governor, host.frequency, host.nodes, host.affinity_text) == ("performance", 1.0, 1, "0-1")
    assert host.warnings_since(replace(host, seconds=host.seconds - 2)) == ()


def test_what_the_kernel_does_not_say_is_no_warning(tmp_path: Path) -> None:
    host = Host.read(tmp_path, affinity=(0, 5, 6))
    assert (host.governor, host.frequency, host.affinity_text) == (None, None, "0,5-6")
    assert host.warnings_since(host) == ()


def test_each_bound(tmp_path: Path) -> None:
    host = Host.read(fake_sys(tmp_path, governor="powersave", frequency=1_300_000), affinity=range(4))
    before = replace(host, seconds=host.seconds - 10, preemptions=host.preemptions - 1000)
    governor, frequency, nodes, preempted = host.warnings_since(before)
    assert "frequency governor powersave" in governor
    assert "50% of its maximum" in frequency
    assert "2 NUMA nodes (cores 0-3): pin it to one" in nodes
    assert "100 involuntary context switches per second, above 50" in preempted


def test_one_core_with_another_governor_is_named_and_the_fastest_core_counts(tmp_path: Path) -> None:
    """An idle core is slow by right."""
    folder = fake_sys(tmp_path) / "cpu" / "cpu1" / "cpufreq"
    (folder / "scaling_governor").write_text("schedutil\n")
    (folder / "scaling_cur_freq").write_text("800000\n")
    host = Host.read(tmp_path, affinity=(0, 1))
    (warning,) = host.warnings_since(host)
    assert host.governor == "performance,schedutil"
    assert "frequency governor schedutil" in warning


def test_a_handful_of_switches_in_a_short_run_is_no_warning(tmp_path: Path) -> None:
    host = Host.read(fake_sys(tmp_path), affinity=(0, 1))
    before = replace(host, seconds=host.seconds - 0.01, preemptions=host.preemptions - 5)
    assert host.warnings_since(before) == ()


def test_this_host_can_be_read() -> None:
    host = Host.read()
    assert host.affinity
    assert host.nodes >= 1
