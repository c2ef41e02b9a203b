"""One measurement out of what every rank of a tensor-parallel run measured: step by step, the slowest rank's.

A token is out when every rank has computed its part, so a step lasts as long as it does on the rank that waits longest.
Rank 0 alone would not show it: all ranks leave the last collective of a step together, but work after it (and, on a
rank that came late, its own start) is seen by one rank only. A barrier in front of every step would hide the late one
altogether, with the time the others lose to it, and would add a collective that generation does not have; so ranks
start the timed generate call together (``worker.Together``) and run free from there. What ranks lose to one another is
thereby part of the latency, as it is for a user.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_npu.conformance.perf.measurement import Measurement

ALIKE = ("input_tokens", "asked_steps", "contexts", "weights", "self_test")
"""What ranks of one run cannot differ in."""


def slowest(measurements: Sequence[Measurement]) -> Measurement:
    """The measurement of the run, whose ranks measured ``measurements``, in the order of ranks.

    ``peak_bytes`` is of the card that needed most, None where one did not say. Warnings name their rank.

    Raises:
        ValueError: ranks did not do the same steps.
    """
    first = measurements[0]
    for rank, other in enumerate(measurements):
        for name in ALIKE:
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"rank {rank} has {name}={_short(getattr(other, name))}, rank 0 has {_short(getattr(first, name))}"
                )
        if len(other.decode_ms) != len(first.decode_ms) or len(other.wall_ms) != len(first.wall_ms):
            raise ValueError(f"rank {rank} timed {len(other.decode_ms) + 1} steps, rank 0 {len(first.decode_ms) + 1}")
    steps = list(zip(*((measured.prefill_ms, *measured.decode_ms) for measured in measurements), strict=True))
    samples = [max(step) for step in steps]
    ranks = [step.index(most) for step, most in zip(steps, samples, strict=True)]  # both clocks of a step are of one
    peaks = [measured.peak_bytes for measured in measurements]
    return Measurement(
        prefill_ms=samples[0],
        decode_ms=tuple(samples[1:]),
        wall_ms=tuple(measurements[rank].wall_ms[step] for step, rank in enumerate(ranks)) if first.wall_ms else (),
        contexts=first.contexts,
        input_tokens=first.input_tokens,
        asked_steps=first.asked_steps,
        peak_bytes=None if None in peaks else max(peak for peak in peaks if peak is not None),
        warnings=tuple(
            f"rank {rank}: {warning}" for rank, measured in enumerate(measurements) for warning in measured.warnings
        ),
        weights=first.weights,
        self_test=first.self_test,
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
