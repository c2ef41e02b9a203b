"""What the cost model predicts with 8-bit weights on Ascend910B4 cards, in graph mode with all steps on.

From the committed graphs, so it needs no NPU and no weights. Predictions, not measurements: nothing with 8-bit weights
is documented, so none of its operators was fitted. Their products count as reaching the part of the bandwidth that
those of bf16 weights reach, and products of 8-bit integers (w8a8) the part of their peak that bf16 products reach of
theirs. What w8a16 needs to make bf16 numbers of the integers is not in the counts: it is as fast as bf16 in prefill at
most.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen2_npu.conformance.graph.baselines import PAST, PROMPT
from qwen2_npu.conformance.perf import cost_model
from qwen2_npu.conformance.perf.rows import Configuration, Row
from qwen2_npu.optimizations import LADDER, QUANTIZED, Phase

CASES: tuple[tuple[str, int, int, Phase], ...] = (
    ("7B", 1, 1, "decode"),
    ("7B", 1, 4, "decode"),
    ("72B", 8, 4, "decode"),
    ("7B", 1, 4, "prefill"),
    ("72B", 8, 4, "prefill"),
)
"""Model, cards, batch, phase."""

STEPS = {"bf16": LADDER[-1], **{scheme: scheme for scheme in QUANTIZED}}


def lines() -> Iterator[str]:
    """The rows of the table: predicted milliseconds, and those of bf16 divided by them, each over all fits."""
    fits = cost_model.load_all()
    for model, cards, batch, phase in CASES:
        rows = {
            name: Row("predicted", Configuration(model, cards, batch, "graph", step), phase)
            for name, step in STEPS.items()
        }
        ms = {name: [cost_model.predict(row, fit) * 1e3 for fit in fits] for name, row in rows.items()}
        faster = [
            cost_model.interval((before / after for before, after in zip(ms["bf16"], ms[name], strict=True)), 2)
            for name in QUANTIZED
        ]
        cells = (phase, model, str(cards), str(batch), *map(cost_model.interval, ms.values()), *faster)
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print them."""
    print(f"Decode with {PAST + 1} live tokens per row, prefill of {PROMPT} tokens per row.\n")
    print(f"| phase | model | cards | batch | {' | '.join(STEPS)} | {' | '.join(f'{name}, ×' for name in QUANTIZED)} |")
    print(f"|{'---|' * (4 + len(STEPS) + len(QUANTIZED))}")
    print(*lines(), sep="\n")


if __name__ == "__main__":
    main()
