"""Models with 8-bit weights as graphs: bytes of the weights, kernels of a layer, numbers, and how many are compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM, compile_model
from qwen2_npu.conformance.graph import baselines, lowering
from qwen2_npu.conformance.graph.baselines import BATCH, EIGHT_BIT_SIZES, DocumentedGraph
from qwen2_npu.conformance.graph.census import Census
from qwen2_npu.conformance.graph.cost import PRODUCTS
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.models.layers import Linear, QuantizingRMSNorm
from qwen2_npu.models.quantized import QuantizedLinear, quantise
from qwen2_npu.optimizations import LADDER, PHASES, QUANTIZED, Phase
from tests.graph import invariants
from tests.graph.counting import GraphCounter
from tests.graph.support import generate, prompt
from tests.unit.quantised import quantised_config, quantised_model
from tests.unit.tokens import assert_same_tokens

SEPARATELY = "separate_norm_quant"
SEPARATE = Optimizations.up_to("w8a8").replace(separate_norm_quant=True)

SWITCHES = {**{scheme: Optimizations.up_to(scheme) for scheme in QUANTIZED}, SEPARATELY: SEPARATE}


def cases(*parameters: Iterable[Any], fast: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Every combination; those that are not ``fast`` are for the slow lane."""
    wanted = set(fast)
    return [
        pytest.param(*case, marks=() if case in wanted else pytest.mark.slow) for case in itertools.product(*parameters)
    ]


def census_of(size: str, phase: Phase, step: str) -> Census:
    """Of the full-size graph, from its baseline."""
    census = baselines.load(DocumentedGraph(size, phase, BATCH, step))
    assert census is not None
    return census.of(SIZES[size].layers)


# ---- bytes and kernels, from the baselines --------------------------------------------------------------------------
def products_of_the_layers(size: Size) -> int:
    """Elements of q, k, v, o, gate, up and down."""
    queries = size.heads * size.head_dim
    qkv = queries + 2 * size.kv_heads * size.head_dim
    return size.layers * size.hidden * (qkv + queries + 3 * size.intermediate)


def outputs_of_the_layers(size: Size) -> int:
    """Rows of those: each has a scale."""
    qkv = (size.heads + 2 * size.kv_heads) * size.head_dim
    return size.layers * (qkv + 2 * size.hidden + 2 * size.intermediate)


def biases(size: Size) -> int:
    return size.layers * (size.heads + 2 * size.kv_heads) * size.head_dim


@pytest.mark.parametrize("size", EIGHT_BIT_SIZES)
def test_a_decode_step_reads_half_of_every_byte_of_the_products(size: str) -> None:
    """The weights of the seven products: a byte in place of two. Head, rows of the embedding and norms are as before.

    Beside them stand the scales, of 2 bytes under w8a16, and of 4 under w8a8, where gate and up have theirs read by
    npu_dequant_swiglu_quant, too. Biases are of 4 bytes in place of 2.
    """
    known = SIZES[size]
    before, w8a16, w8a8 = (census_of(size, "decode", step).cost.weight_bytes for step in (LADDER[-1], *QUANTIZED))
    products, scales = products_of_the_layers(known), outputs_of_the_layers(known)
    assert before - w8a16 == products - 2 * scales - 2 * biases(known)
    gate_up = known.layers * 2 * known.intermediate
    assert before - w8a8 == products - 4 * scales - 4 * gate_up - 2 * biases(known)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("size", EIGHT_BIT_SIZES)
def test_kernels_of_a_layer(size: str, phase: Phase) -> None:
    """As many with w8a16 as before; with w8a8 one more, which quantises what o_proj is given."""
    layers = [baselines.load(DocumentedGraph(size, phase, BATCH, step)) for step in (LADDER[-1], *QUANTIZED)]
    before, w8a16, w8a8 = (found.layer.cost.launches for found in layers if found is not None)
    assert (w8a16, w8a8) == (before, before + 1)


@pytest.mark.parametrize("size", EIGHT_BIT_SIZES)
def test_the_cache_and_the_head_are_as_before(size: str) -> None:
    before, *others = (census_of(size, "decode", step) for step in (LADDER[-1], *QUANTIZED))
    assert {census.cost.cache_bytes for census in others} == {before.cost.cache_bytes}
    head = 2 * SIZES[size].hidden * SIZES[size].vocab
    floating = PRODUCTS - set(invariants.EIGHT_BIT_PRODUCTS.values())
    for census in others:
        assert sum(cost.weight_bytes for name, cost in census.costs.items() if name in floating) == head


# ---- lowered now ----------------------------------------------------------------------------------------------------
SMALL = SIZES["1.5B"]


def lowered(
    phase: Phase, optimizations: Optimizations, change: Callable[[Any], None] = lambda model: None, ranks: int = 1
) -> lowering.Lowered:
    config = SMALL.config(layers=2, scheme=optimizations.scheme)
    with (
        lowering.fake_ranks(ranks) as group,
        lowering.fake_model(config, optimizations, torch.bfloat16, group) as model,
    ):
        change(model)
        step, arguments = lowering.step_arguments(model, phase, 2, 256, 128)
        raw = lowering.lower_call(step, arguments, dynamic=True)
    return lowering.describe(raw, config, phase, 2, 128, ranks=ranks, unlike=int(phase == "prefill"))


def problems(found: lowering.Lowered, optimizations: Optimizations) -> list[str]:
    return invariants.problems(found, optimizations, SMALL.vocab // found.ranks)


@pytest.mark.parametrize(
    ("name", "phase", "ranks"),
    cases(SWITCHES, PHASES, (1, 2), fast=[("w8a8", "prefill", 1), ("w8a16", "decode", 2), (SEPARATELY, "decode", 1)]),
)
def test_invariants(name: str, phase: Phase, ranks: int) -> None:
    assert problems(lowered(phase, SWITCHES[name], ranks=ranks), SWITCHES[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", [step for step in LADDER if Optimizations.up_to(step).flash_attention])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_invariants_of_every_step_of_the_ladder(scheme: str, step: str) -> None:
    optimizations = Optimizations.up_to(step).replace(**{scheme: True})
    found = lowering.lower(SMALL.config(layers=1, scheme=scheme), "decode", 2, 256, optimizations)
    assert problems(found, optimizations) == []


def floating_down_proj(model: Qwen2ForCausalLM) -> None:
    """A layer whose weights are no integers."""
    down = model.model.layers[0].mlp.down_proj
    with torch.device(lowering.DEVICE):
        made = Linear(down.in_features, down.out_features, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    original = made.forward
    made.forward = lambda x, phase="decode": original(_floats(x))  # type: ignore[assignment, misc]
    model.model.layers[0].mlp.down_proj = made


def _floats(x: Any) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else (x.values * x.scale.unsqueeze(-1)).bfloat16()


def dequantised_before_the_product(model: Qwen2ForCausalLM) -> None:
    """The weight is widened in every step: what 8 bits save is lost, and more."""

    def forward(self: Any, x: Any, phase: str = "decode") -> torch.Tensor:
        return _floats(x) @ (self.weight.to(torch.bfloat16) * self.weight_scale).mT

    layer = model.model.layers[0].self_attn.o_proj
    layer.forward = forward.__get__(layer)


def quantised_by_every_product(model: Qwen2ForCausalLM) -> None:
    """The norm hands out ordinary rows, and each product quantises them for itself: q, k and v, three times."""
    norm = model.model.layers[1].post_attention_layernorm
    assert isinstance(norm, QuantizingRMSNorm)
    swiglu = model.model.layers[1].mlp
    original = swiglu.forward
    swiglu.forward = lambda x, phase="decode": original(quantise(_floats(x)), phase)


FAULTS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "floating_weight": ("w8a16", floating_down_proj, "eight_bit_weights"),
    "floating_weight_w8a8": ("w8a8", floating_down_proj, "eight_bit_weights"),
    "dequantised": ("w8a16", dequantised_before_the_product, "no_wide_copies"),
    "quantised_twice": ("w8a8", quantised_by_every_product, "activations_quantised_once"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_seen(fault: str) -> None:
    scheme, change, invariant = FAULTS[fault]
    found = problems(lowered("decode", Optimizations.up_to(scheme), change), Optimizations.up_to(scheme))
    assert any(problem.startswith(f"{invariant}:") for problem in found), found


@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_ordinary_weights_where_8_bits_are_claimed_and_the_other_way_round() -> None:
    for scheme in QUANTIZED:
        found = problems(lowered("decode", Optimizations.all()), Optimizations.up_to(scheme))
        assert any("eight_bit_weights:" in problem for problem in found)
        found = problems(lowered("decode", Optimizations.up_to(scheme)), Optimizations.all())
        assert any("eight_bit_weights:" in problem for problem in found)


def test_a_norm_apart_from_its_quantisation_is_seen() -> None:
    found = problems(lowered("decode", SEPARATE), SWITCHES["w8a8"])
    assert any("0 AddRmsNormDynamicQuant" in problem for problem in found)


# ---- what is computed, and how often it is compiled -----------------------------------------------------------------
@cache
def built(scheme: str) -> Any:
    """On the CPU; in float32, which graphs compute as eager mode does."""
    return quantised_model(quantised_config(scheme, num_hidden_layers=2))


def build(device: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    optimizations = SWITCHES[name]
    reference = built(str(optimizations.scheme))
    state = reference.stock_state_dict()
    return Qwen2ForCausalLM.from_state_dict(
        reference.config, state, device=device, dtype=dtype, optimizations=optimizations
    ).eval()


NEW_TOKENS = 12

MODES = ("eager", "torchair", "npugraph_ex")


@pytest.mark.parametrize(
    ("name", "mode"), cases(SWITCHES, MODES, fast=[("w8a8", "torchair"), ("w8a16", "npugraph_ex")])
)
def test_tokens_are_the_cpus(name: str, mode: str, device: str) -> None:
    calls = [{"batch": 2, "tokens": 9}, {"batch": 2, "tokens": 9, "ragged": True}]
    reference = build("cpu", name)
    expected = [generate(reference, prompt("cpu", **call), NEW_TOKENS) for call in calls]
    torch._dynamo.reset()
    model = compile_model(build(device, name), mode)
    for call, tokens in zip(calls, expected, strict=True):
        found = generate(model, prompt(device, **call), NEW_TOKENS)
        assert_same_tokens(found, tokens, reference, prompt("cpu", **call))


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases(SWITCHES, (torch.bfloat16, torch.float16), fast=[("w8a16", torch.bfloat16), ("w8a8", torch.float16)]),
)
def test_a_graph_computes_what_eager_mode_computes(name: str, dtype: torch.dtype, device: str) -> None:
    """Bit for bit on the emulated device: the same kernels in the same order."""
    call = prompt(device, 2, 9)
    eager = build(device, name, dtype)(**call, logits_to_keep=1)
    with GraphCounter() as counter:
        compiled = compile_model(build(device, name, dtype), "torchair")
        graph = compiled(**call, logits_to_keep=1)
        assert counter.runs == 1, counter.describe()
    worst = (graph.logits - eager.logits).abs().max().item()
    assert worst <= 8 * torch.finfo(dtype).eps * eager.logits.abs().max().item()


@pytest.mark.parametrize("name", ["w8a8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("w8a16", SEPARATELY))])
def test_two_graphs_serve_many_steps_and_calls(name: str, device: str) -> None:
    with GraphCounter() as counter:
        model = compile_model(build(device, name), "torchair")
        for tokens, ragged, new, runs in ((9, False, 30, 30), (9, True, 10, 40), (12, False, 10, 50)):
            generate(model, prompt(device, 3, tokens, ragged=ragged), new)
            assert (counter.compiled, counter.runs) == (2, runs), counter.describe()


def test_a_copy_that_is_made_anew_in_every_step_is_seen(device: str) -> None:
    """Another address would be another graph; the copies in float32 stay where they are."""
    with GraphCounter():
        model = compile_model(build(device, "w8a8"), "torchair")
        generate(model, prompt(device, 2, 9), 3)
        copies = [module.wide_scale.data_ptr() for module in model.modules() if isinstance(module, QuantizedLinear)]
        generate(model, prompt(device, 2, 9), 3)
        again = [module.wide_scale.data_ptr() for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert copies == again
    assert len(copies) == 8
