"""Models with 8-bit weights that ranks share: which integers and scales each holds, and what they compute together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen2_npu import LADDER, Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint import quantized, weights
from qwen2_npu.checkpoint.sources import StateDictSource
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import Shard
from tests.unit.parallel.virtual import Run, virtual_ranks
from tests.unit.quantised import SCHEMES, dequantised, products, quantised_config, quantised_model
from tests.unit.small import small_config

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 140, 3], [1, 4, 190, 60, 61, 12, 9, 9]])


def part_of(model: Any, ranks: Ranks, optimizations: Optimizations | None = None, dtype: Any = None) -> Any:
    """What ``ranks`` say of the model."""
    source = quantized.present(StateDictSource(model.config, model.stock_state_dict()))
    return weights.build(
        lambda: Qwen2ForCausalLM(model.config, optimizations, ranks), source, dtype=dtype, device=torch.device("cpu")
    )


@pytest.fixture
def two() -> Any:
    with virtual_ranks(2) as run:
        yield run


ROWS = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "gate_proj": 48, "up_proj": 48}
"""Of two ranks, where rows are cut."""
COLUMNS = {"o_proj": 128, "down_proj": 48}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_are_cut_with_their_rows(scheme, rank):
    whole = quantised_model(quantised_config(scheme), Optimizations.only(scheme))
    part = part_of(whole, Ranks(Shard(rank, 2)), Optimizations.only(scheme))
    for name, module in products(part).items():
        given, kind = whole.get_submodule(name), name.rpartition(".")[2]
        if kind in ROWS:
            mine = slice(rank * ROWS[kind], (rank + 1) * ROWS[kind])
            expected = given.weight[mine], given.weight_scale[mine]
        else:
            mine = slice(rank * COLUMNS[kind], (rank + 1) * COLUMNS[kind])
            expected = given.weight[:, mine], given.weight_scale
        assert torch.equal(module.weight, expected[0]), name
        assert torch.equal(module.weight_scale, expected[1]), name
    assert len(products(part)) == 7 * 3


def sliced_per_rank(ranks: int) -> Any:
    """Activations as ``ranks`` quantise them before o_proj and down_proj: each its own part of a row."""

    def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        parts = x.unflatten(-1, (ranks, -1))
        scale = parts.abs().amax(-1, keepdim=True) / 127
        return (((parts / torch.where(scale == 0, 1, scale)).round() * scale).flatten(-2), *rest)

    return hook


def reference(model: Any, scheme: str, ranks: int) -> Any:
    """The model with ordinary weights of the same numbers."""
    plain = Qwen2ForCausalLM.from_state_dict(small_config(), dequantised(model), optimizations=Optimizations.none())
    if scheme == "w8a8":
        for name in products(model):
            cut = ranks if name.endswith(("o_proj", "down_proj")) else 1
            plain.get_submodule(name).register_forward_pre_hook(sliced_per_rank(cut))
    return plain


@pytest.mark.parametrize("step", [*LADDER, "separate_norm_quant"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_ranks_compute_what_their_integers_say(two: Run, scheme: str, step: str) -> None:
    if step == "separate_norm_quant":
        if scheme != "w8a8":
            pytest.skip("w8a16 quantises no activations")
        optimizations = Optimizations.up_to(scheme).replace(separate_norm_quant=True)
    else:
        optimizations = Optimizations.up_to(step).replace(**{scheme: True})
    model = quantised_model(quantised_config(scheme), Optimizations.only(scheme))
    expected = reference(model, scheme, 2)(IDS).logits

    def logits(ranks: Ranks) -> torch.Tensor:
        return part_of(model, ranks, optimizations)(IDS).logits

    found = two(logits)
    assert torch.equal(found[0], found[1])
    worst = (found[0] - expected).abs().amax(-1)
    # A value in the middle between two integers may become the other one: at a few positions.
    assert worst.median() < 1e-4
    assert worst.max() < (1e-4 if scheme == "w8a16" else 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_ranks_generate_the_tokens_of_one(two: Run, scheme: str, dtype: torch.dtype) -> None:
    model = quantised_model(quantised_config(scheme))
    alone = part_of(model, Ranks(), dtype=dtype).generate(IDS, max_new_tokens=4, do_sample=False)
    found = two(lambda ranks: part_of(model, ranks, dtype=dtype).generate(IDS, max_new_tokens=4, do_sample=False))
    assert torch.equal(found[0], found[1])
    agree = (found[0] == alone).float().mean().item()
    assert agree == 1 if dtype == torch.float32 and scheme == "w8a16" else agree > 0.7
