"""What a layer launches, step by step: the census as stacked bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qwen2_npu.conformance.report.charts.canvas import color
from qwen2_npu.conformance.report.charts.rows import canvas, heading, number

KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": (
        "GroupedMatmul", "WeightQuantBatchMatmulV2", "QuantBatchMatmulV3",
        *(f"{b}MatMul{v}" for b in ("", "Batch") for v in ("", "V2", "V3")),
    ),
    "attention": ("PromptFlashAttention", "IncreFlashAttention", "FusedInferAttentionScore", "SoftmaxV2", "MaskedFill"),
    "norms": ("RmsNorm", "AddRmsNorm", "AddRmsNormDynamicQuant", "ReduceMean", "Rsqrt", "Square", "Pow"),
    "rotary": ("ApplyRotaryPosEmb", "RotaryPositionEmbedding", "RotaryMul"),
    "cache writes": ("Scatter", "ScatterUpdate", "ScatterPaKvCache"),
    "activation": ("Swish", "SwiGlu", "DequantSwigluQuant", "DynamicQuant", "Silu", "Sigmoid"),
    "collectives": ("HcomAllReduce", "HcomAllGather", "MatmulAllReduce"),
    "data moves": (
        "TensorMove", "Identity", "Transpose", "SplitV", "Split", "SplitD", "ConcatV2", "ConcatD", "MoeInitRoutingV3",
        "Pack", "BroadcastTo", "Expand", "Fill", "Slice", "StridedSliceV2", "Cast", "ZerosLike", "Assign", "Tile",
    ),
}  # fmt: skip
"""Kind -> GE operators; everything else is arithmetic of small operators."""

REST = "other arithmetic"
ALL_KINDS = (*KINDS, REST)

_KIND_OF = {operator: kind for kind, operators in KINDS.items() for operator in operators}


def kind_of(operator: str) -> str:
    """The kind a GE operator is drawn as."""
    return _KIND_OF.get(operator, REST)


def kernels(steps: Sequence[str], layers: Mapping[str, Mapping[str, int]], title: str, width: int) -> str:
    """SVG. ``layers``: step -> GE operator -> kernels of one layer."""
    made, axes = canvas(len(steps), width)
    heading(axes, title)
    for row, step in enumerate(steps):
        if step not in layers:
            continue
        counts: Counter[str] = Counter()
        for operator, count in layers[step].items():
            counts[kind_of(operator)] += count
        start = 0
        for index, kind in enumerate(ALL_KINDS, start=1):
            axes.barh(row, counts[kind], left=start, height=0.5, color=color(f"kind-{index}"))
            start += counts[kind]
        number(axes, start, row, str(start))
    most = max((sum(operators.values()) for operators in layers.values()), default=1)
    axes.set_xlim(0, most * 1.1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return made.svg(f"{title}: kernels of one decoder layer per step, by kind")
