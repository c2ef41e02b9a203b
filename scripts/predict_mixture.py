"""What the cost model predicts of Qwen2-57B-A14B on Ascend910B4 cards, in graph mode with all steps on.

From the committed graphs, so it needs no NPU and no weights. Predictions, not measurements: nothing of a mixture of
experts is documented, so none of its operators was fitted; grouped products count as the products that were.
"""

from __future__ import annotations

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.perf import cost_model
from qwen2_npu.conformance.perf.rows import Configuration, Row
from qwen2_npu.conformance.sizes import SIZES


def main() -> None:
    """Print a table: predicted milliseconds, bytes of one card, and experts read per layer."""
    fits = cost_model.load_all()
    print("| cards | phase | batch | predicted ms | GB moved | of them experts | experts: least, expected, most |")
    print("|---|---|---|---|---|---|---|")
    graphs = [graph for graph in baselines.documented() if graph.size in baselines.MIXTURES]
    for graph in sorted(graphs, key=lambda graph: (SIZES[graph.size].shards, graph.phase, graph.batch)):
        size = SIZES[graph.size]
        if graph.step != size.ladder[-1]:
            continue
        model = size.name if size.whole is None else size.whole.name
        row = Row("predicted", Configuration(model, size.shards, graph.batch, "graph", graph.step), graph.phase)
        cost, read = cost_model.census_of(row), graph.experts_read
        experts = cost.costs["GroupedMatmul"].weight_bytes
        ms = cost_model.interval(cost_model.predict(row, fit) * 1e3 for fit in fits)
        print(
            f"| {size.shards} | {graph.phase} | {graph.batch} | {ms} "
            f"| {cost.cost.nbytes / 1e9:.1f} | {experts / 1e9:.1f} | {read.least}, {read.expected:.1f}, {read.most} |"
        )


if __name__ == "__main__":
    main()
