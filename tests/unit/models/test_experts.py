"""The block of experts against its formula in float64, by operators and one expert after the other."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from qwen2_npu import Optimizations, Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Model
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models.experts import SparseMLP
from qwen2_npu.parallel.collectives import ALONE, Ranks
from qwen2_npu.parallel.sharding import Shard
from tests.unit.mixture import mixture_config, needs_mixtures
from tests.unit.small import small_stock, stock_weights

HIDDEN, COLUMNS, SHARED, COUNT, TOP = 32, 16, 24, 6, 2
PATHS = {
    "one by one": Optimizations.none(),
    "one by one, swiglu": Optimizations.up_to("swiglu"),
    "operators": Optimizations.all(),
}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
"""Largest error where values are about 1: some roundings of the dtype."""


def block_config(normalised: bool = False) -> Any:
    return SimpleNamespace(
        model_type="qwen2_moe",
        hidden_size=HIDDEN,
        num_experts=COUNT,
        num_experts_per_tok=TOP,
        norm_topk_prob=normalised,
        moe_intermediate_size=COLUMNS,
        shared_expert_intermediate_size=SHARED,
    )


def block_of(path: str, *, normalised: bool = False, dtype: torch.dtype = torch.float32) -> SparseMLP:
    """The same random weights for every path."""
    block = SparseMLP(block_config(normalised), PATHS[path], ALONE).requires_grad_(False)
    values = weights()
    for name, parameter in block.named_parameters():
        if name.startswith("shared_expert.g") or name.startswith("shared_expert.u"):
            parts = ("gate_proj", "up_proj") if "gate_up" in name else (name.split(".")[1],)
            parameter.data = torch.cat([values[f"shared_expert.{part}.weight"] for part in parts])
        else:
            parameter.data = values[name].clone()
    return block.to(dtype)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def matrix(*shape: int, inner: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / inner**0.5).bfloat16().float()  # exact in every dtype

    return {
        "gate.weight": 2 * matrix(COUNT, HIDDEN, inner=HIDDEN),
        "experts.gate_up_proj": matrix(COUNT, HIDDEN, 2 * COLUMNS, inner=HIDDEN),
        "experts.down_proj": matrix(COUNT, COLUMNS, HIDDEN, inner=COLUMNS),
        "shared_expert.gate_proj.weight": matrix(SHARED, HIDDEN, inner=HIDDEN),
        "shared_expert.up_proj.weight": matrix(SHARED, HIDDEN, inner=HIDDEN),
        "shared_expert.down_proj.weight": matrix(HIDDEN, SHARED, inner=SHARED),
        "shared_expert_gate.weight": matrix(1, HIDDEN, inner=HIDDEN),
    }


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def formula(x: torch.Tensor, chosen: torch.Tensor, normalised: bool) -> torch.Tensor:
    """Token after token, in float64, of the experts given: a near-tie of the router is not what is tested."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    rows = []
    for token, experts in zip(x.reshape(-1, HIDDEN).double(), chosen.tolist(), strict=True):
        scores = torch.exp(w["gate.weight"] @ token)
        p = (scores / scores.sum())[experts]
        p = p / p.sum() if normalised else p
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, expert in zip(p, experts, strict=True):
            gate, up = (token @ w["experts.gate_up_proj"][expert]).chunk(2)
            total += weight * ((silu(gate) * up) @ w["experts.down_proj"][expert])
        shared = silu(w["shared_expert.gate_proj.weight"] @ token) * (w["shared_expert.up_proj.weight"] @ token)
        gate = 1 / (1 + torch.exp(-w["shared_expert_gate.weight"] @ token))
        rows.append(total + gate * (w["shared_expert.down_proj.weight"] @ shared))
    return torch.stack(rows).view(x.shape)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(11)).to(dtype)


@pytest.mark.parametrize("normalised", [False, True], ids=["as they are", "normalised"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_formula(path: str, dtype: torch.dtype, normalised: bool) -> None:
    block, x = block_of(path, normalised=normalised, dtype=dtype), tokens(3, 7, dtype=dtype)
    weight, chosen = block.route(x.reshape(-1, HIDDEN))
    assert (weight.dtype, chosen.dtype) == (dtype, torch.int32)
    assert (weight[:, 0] >= weight[:, 1]).all()
    found = block(x)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    torch.testing.assert_close(found.double(), formula(x, chosen, normalised), rtol=0, atol=BOUNDS[dtype])


@pytest.mark.parametrize("normalised", [False, True], ids=["as they are", "normalised"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_weights_of_16_bits_are_rounded_once(path: str, dtype: torch.dtype, normalised: bool) -> None:
    """Softmax, sum and quotient are of float32, whatever the dtype of the logits."""
    block, x = block_of(path, normalised=normalised, dtype=dtype), tokens(200, dtype=dtype)
    weight, chosen = block.route(x)
    exact = torch.softmax(block.gate(x).double(), -1).gather(1, chosen.long())
    exact = exact / exact.sum(-1, keepdim=True) if normalised else exact
    assert (weight == exact.to(dtype)).double().mean() > 0.995  # float32 and float64 differ beside a tie


@pytest.mark.parametrize("normalised", [False, True], ids=["as they are", "normalised"])
def test_the_router_chooses_the_largest_and_weighs_them_by_the_softmax_over_all(normalised: bool) -> None:
    x = tokens(40)
    logits = x.double() @ weights()["gate.weight"].double().t()
    best = logits.sort(descending=True).indices[:, :TOP]
    expected = torch.softmax(logits, -1).gather(1, best)
    for path in PATHS:
        weight, chosen = block_of(path, normalised=normalised).route(x)
        assert torch.equal(chosen.long(), best)
        sums = expected.sum(-1, keepdim=True) if normalised else 1
        torch.testing.assert_close(weight.double(), expected / sums, rtol=1e-5, atol=0)
        if normalised:
            torch.testing.assert_close(weight.sum(-1), torch.ones(40))


def routed(path: str, chosen: list[list[int]], x: torch.Tensor) -> torch.Tensor:
    """The block with these experts, each with half the weight."""
    block = block_of(path)
    experts = torch.tensor(chosen, dtype=torch.int32)
    return block.experts(x, torch.full(experts.shape, 0.5), experts, torch.zeros_like(x))


CHOICES: dict[str, list[list[int]]] = {
    "an expert without a token": [[0, 1], [3, 0], [4, 5], [1, 4]],
    "all tokens on the same experts": [[2, 4]] * 4,
    "the last expert alone has none": [[0, 1], [1, 2], [2, 3], [3, 4]],
    "one token": [[5, 0]],
    "each expert once": [[0, 1], [2, 3], [4, 5]],
}


@pytest.mark.parametrize("name", CHOICES)
def test_any_distribution_of_the_tokens(name: str) -> None:
    chosen = CHOICES[name]
    x = tokens(len(chosen))
    w = {key: tensor.double() for key, tensor in weights().items()}
    expected = torch.zeros(len(chosen), HIDDEN, dtype=torch.float64)
    for row, experts in enumerate(chosen):
        for expert in experts:
            gate, up = (x[row].double() @ w["experts.gate_up_proj"][expert]).chunk(2)
            expected[row] += 0.5 * ((silu(gate) * up) @ w["experts.down_proj"][expert])
    for path in PATHS:
        torch.testing.assert_close(routed(path, chosen, x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_token_gets_the_same_alone_and_among_others(path: str) -> None:
    block, x = block_of(path), tokens(5, 1)
    together = block(x)
    for row in range(5):
        torch.testing.assert_close(block(x[row : row + 1]), together[row : row + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_experts_that_nobody_chose_do_not_matter(path: str) -> None:
    """Not even where their weights are not finite."""
    x = tokens(1)
    block = block_of(path)
    expected, (_, chosen) = block(x), block.route(x)
    unused = [expert for expert in range(COUNT) if expert not in chosen]
    for parameter in (block.experts.gate_up_proj, block.experts.down_proj):
        parameter.data[unused] = float("nan")
    assert torch.equal(block(x), expected)


class Called(TorchFunctionMode):
    """The npu operators that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(func).partition(".")
        if space == "npu":
            self.names.append(name.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", PATHS)
def test_which_operators_compute_a_block(path: str) -> None:
    """With its step, none looks up on the host where the tokens go."""
    with Called() as called:
        block_of(path)(tokens(5))
    routing = ["gating_top_k_softmax", "init_routing_v2", "finalize_routing"]
    expected = sorted([*(f"npu_moe_{name}" for name in routing), "npu_grouped_matmul", "npu_grouped_matmul"])
    assert sorted(name for name in called.names if name != "npu_swiglu") == (expected if path == "operators" else [])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1, 2])
def test_every_rank_holds_its_columns_of_all_experts(path: str, size: int) -> None:
    config = block_config()
    block = SparseMLP(config, PATHS[path], Ranks(Shard(0, size)))
    columns = COLUMNS // size
    assert block.experts.gate_up_proj.shape == (COUNT, HIDDEN, 2 * columns)
    assert block.experts.down_proj.shape == (COUNT, columns, HIDDEN)
    assert block.shared_expert.down_proj.weight.shape == (HIDDEN, SHARED // size)
    assert block.gate.weight.shape == (COUNT, HIDDEN)
    assert block.shared_expert_gate.weight.shape == (1, HIDDEN)


def test_all_paths_choose_the_same() -> None:
    x = tokens(64)
    found = [block_of(path).route(x) for path in PATHS]
    for weight, chosen in found[1:]:
        assert torch.equal(chosen, found[0][1])
        torch.testing.assert_close(weight, found[0][0], rtol=1e-6, atol=0)


@needs_mixtures
def test_a_mixture_is_one_however_it_is_made(tmp_path: Path) -> None:
    """Its folder names its class, and what there is for dense models alone is refused."""
    from qwen2_npu.models.qwen2_moe import Qwen2MoeForCausalLM

    stock = small_stock(mixture_config())
    stock.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    for count, make in enumerate(
        (
            lambda cls: cls.from_state_dict(stock.config, stock_weights(stock)),
            lambda cls: cls.from_pretrained(tmp_path / "theirs"),
        )
    ):
        model = make(Qwen2ForCausalLM)
        assert type(model) is Qwen2MoeForCausalLM
        model.save_pretrained(tmp_path / f"ours {count}")
        config = json.loads((tmp_path / f"ours {count}" / "config.json").read_text())
        assert (config["architectures"], config["model_type"]) == (["Qwen2MoeForCausalLM"], "qwen2_moe")
        for other in (Qwen2Model, Qwen2ForSequenceClassification):  # not: tensors of the head are missing
            with pytest.raises(
                UnsupportedError, match=rf"^{other.__name__} of a mixture of experts \(.*\) is not served: load it with"
            ):
                make(other)
