"""One rank of a row on several cards; :mod:`qwen2_npu.conformance.jobs` starts this module once per card."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen2_npu.conformance import jobs
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.parallel.agreement import of_all_ranks
from qwen2_npu.parallel.launch import RankGroup


def of_slowest_rank(own: Measurement) -> Measurement:
    """Of all ranks that made the call together, each of which gives its own; alone, its own."""
    every = of_all_ranks(asdict(own))
    return own if len(every) == 1 else Measurement.slowest([Measurement.from_json(each) for each in every])


def measured(request: dict[str, Any], group: RankGroup, **protocol_changes: Any) -> dict[str, Any]:
    """What ``request`` asks for, and on what it was computed."""
    from qwen2_npu.conformance.machine.verified import Verified
    from qwen2_npu.conformance.perf import protocol
    from qwen2_npu.conformance.perf.builds import Weights
    from qwen2_npu.conformance.perf.rows import Configuration

    configuration, path, device = Configuration(**request["configuration"]), request["model_path"], str(group.device)
    weights = Weights.of(configuration.model, path and Path(path), request["assume_tp"])
    own = protocol.measure(
        weights.build(configuration, device),
        batch=configuration.batch,
        decode_steps=request["decode_steps"],
        weights=weights.description,
        **protocol_changes,
    )
    return {"verified": Verified.on(device).text, "measurement": asdict(of_slowest_rank(own))}


if __name__ == "__main__":
    sys.exit(jobs.answer(measured))
