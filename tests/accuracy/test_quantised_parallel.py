"""Models with 8-bit weights that ranks share agree with the stock model, whose activations are scaled as theirs are.

The ranks are threads over gloo, on the CPU (tests/unit/parallel/virtual.py). Why the number of ranks belongs to what
``w8a8`` computes: ``qwen2_npu/conformance/accuracy/quantised.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qwen2_npu import Optimizations
from qwen2_npu.conformance.accuracy import channels, locate_error
from qwen2_npu.conformance.accuracy.stock import HEAD_DIM_IS_FREE
from qwen2_npu.optimizations import QUANTIZED
from tests.accuracy.sharded import Shared, shared_in_8_bits
from tests.accuracy.test_tensor_parallel import check_greedy
from tests.unit.parallel.virtual import Run, virtual_ranks

pytestmark = pytest.mark.skipif(
    not HEAD_DIM_IS_FREE, reason="transformers 4.37 ties the head counts to the hidden size"
)

LAYOUTS = [
    # 28/4 at 4 and 2, and 12/2 at 4, where two ranks hold the same kv head
    pytest.param("qwen2-7b", 2, "bfloat16"),
    pytest.param("qwen2-1.5b", 4, "bfloat16"),
    pytest.param("qwen2-7b", 4, "float16", marks=pytest.mark.slow),
    pytest.param("qwen2-72b", 8, "bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize(("weights", "count", "dtype"), LAYOUTS)
def test_ranks_agree_at_every_position(weights: str, count: int, dtype: str, scheme: str) -> None:
    """In every channel of every product, and in free-running text as well."""
    subject = shared_in_8_bits(weights, scheme, dtype, count)
    with virtual_ranks(count) as run:
        comparison = subject.compare(run, Optimizations.up_to(scheme), "ragged")
        assert comparison.passed, comparison.failures()
        assert wrong_channel(subject, run, Optimizations.up_to(scheme)) is None
        if scheme == "w8a16":  # one rank alone computes another function under w8a8
            check_greedy(subject, run, Optimizations.up_to(scheme))


def wrong_channel(subject: Shared, run: Run, optimizations: Optimizations) -> Any:
    """What ``Pair.wrong_channel`` says of the ranks' model."""
    batch = subject.pair.batch(channels.SHAPE)

    def captured(ranks: Any) -> Any:
        model = subject.build(ranks, optimizations)
        return locate_error.captures(model, batch, batch.nothing_forced())

    (ours,) = run(captured)[0]
    for layer in subject.pair.layers(rounded=optimizations.w8a8):
        points = [point for point in ours.points if point.layer == layer.number]
        found = layer.first_wrong(points, subject.pair.dtype)
        if found is not None:
            return found
    return None


@pytest.mark.parametrize("supposed", [1, 4])
def test_another_number_of_ranks_is_another_function(supposed: int) -> None:
    """Two ranks, held against the activations of one and of four: the parts of a row have other scales."""
    right = shared_in_8_bits("qwen2-7b", "w8a8", "bfloat16", 2)
    wrong = replace(right, pair=shared_in_8_bits("qwen2-7b", "w8a8", "bfloat16", supposed).pair)
    with virtual_ranks(2) as run:
        found = wrong_channel(wrong, run, Optimizations.up_to("w8a8"))
        assert wrong_channel(right, run, Optimizations.up_to("w8a8")) is None
    assert found is not None
    assert found.name in ("o_proj", "down_proj")
