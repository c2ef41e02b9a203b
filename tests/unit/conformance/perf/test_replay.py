"""The replayed clock under pytest-benchmark's own statistics."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2_npu.conformance.perf.replay import Replay

CLOCK = Replay()


@pytest.mark.benchmark(timer=CLOCK)
def test_statistics_are_those_of_the_samples(benchmark: Any) -> None:
    if benchmark.disabled:
        pytest.skip("pytest-benchmark is off under xdist; test_latency's own tests run it in a subprocess")
    CLOCK.load((10.0, 20.0, 60.0))
    benchmark.pedantic(lambda: None, rounds=3)
    stats = benchmark.stats.stats
    assert sorted(stats.data) == [0.01, 0.02, 0.06]
    assert (stats.mean, stats.median) == (pytest.approx(0.03), 0.02)


def test_every_sample_is_exact() -> None:
    clock = Replay()
    samples = [24.0 + step / 7 for step in range(1023)]
    clock.load(samples)
    shown = [-clock() + clock() for _ in samples]
    assert shown == [sample / 1e3 for sample in samples]
