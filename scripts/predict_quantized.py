"""What the cost model predicts of decode with 8-bit weights on Ascend910B4 cards, in graph mode with all steps on.

From the committed graphs, so it needs no NPU and no weights. Predictions, not measurements: nothing with 8-bit weights
is documented, so none of its operators was fitted. Their products count as reaching the part of the bandwidth that
those of bf16 weights reach; how fast they multiply matters little in decode, and is taken as for bf16.
"""

from __future__ import annotations

from qwen2_npu.conformance.graph.baselines import PAST
from qwen2_npu.conformance.perf import cost_model
from qwen2_npu.conformance.perf.rows import Configuration, Row
from qwen2_npu.optimizations import LADDER, QUANTIZED

CASES = (("7B", 1, 1), ("7B", 1, 4), ("72B", 8, 4))
"""Model, cards, batch."""

STEPS = {"bf16": LADDER[-1], **{scheme: scheme for scheme in QUANTIZED}}


def main() -> None:
    """Print a table: predicted milliseconds, and those of bf16 divided by them, each over all fits."""
    fits = cost_model.load_all()
    print(f"Decode, {PAST + 1} live tokens per row.\n")
    print(f"| model | cards | batch | {' | '.join(STEPS)} | {' | '.join(f'{name}, ×' for name in QUANTIZED)} |")
    print(f"|{'---|' * (3 + len(STEPS) + len(QUANTIZED))}")
    for model, cards, batch in CASES:
        rows = {
            name: Row("predicted", Configuration(model, cards, batch, "graph", step), "decode")
            for name, step in STEPS.items()
        }
        ms = {name: [cost_model.predict(row, fit) * 1e3 for fit in fits] for name, row in rows.items()}
        faster = [
            cost_model.interval((before / after for before, after in zip(ms["bf16"], ms[name], strict=True)), 2)
            for name in QUANTIZED
        ]
        cells = (model, str(cards), str(batch), *map(cost_model.interval, ms.values()), *faster)
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
