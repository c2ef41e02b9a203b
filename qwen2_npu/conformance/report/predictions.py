"""Predicted latencies of the documented rows: from a file of the run, else from the committed cost model."""

from __future__ import annotations

from qwen2_npu.conformance.report.inputs import PREDICTIONS, RunInputs


def predictions(inputs: RunInputs) -> tuple[dict[str, tuple[float, float]], str]:
    """Row id -> least and most milliseconds, and where they are from. The cost model needs torch; the page does not."""
    if inputs.predictions is not None:
        return inputs.predictions, f"{PREDICTIONS} of this run"
    try:
        from qwen2_npu import emulator

        emulator.activate_where_needed()
        from qwen2_npu.conformance.perf import cost_model

        made = {made.documented.row.id: (made.low, made.high) for made in cost_model.predictions()}
    except Exception as error:  # whatever keeps torch from loading must not keep the page from being made
        return {}, f"none: the cost model cannot be loaded here ({(str(error) or repr(error)).splitlines()[0]})"
    return made, "the cost model of baselines/cost_model.json, fitted on the 7B tables and one 72B configuration"
