"""Models with 8-bit weights: their numbers, which operators compute them, and what is refused."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models.layers import Linear, QuantizingRMSNorm
from qwen2_npu.models.quantized import QuantizedLinear, QuantizedRows, quantise
from qwen2_npu.optimizations import LADDER
from tests.unit.quantised import SCHEMES, dequantised, like, products, quantised_config, quantised_model
from tests.unit.small import small_config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 140, 3], [1, 4, 190, 60, 61, 12, 9, 9]])


class Called(TorchFunctionMode):
    """Counts the npu operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(func).partition(".")
        if space == "npu":
            self.counts[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


# ---- one layer ------------------------------------------------------------------------------------------------------
def layer_of(scheme: Any, dtype: torch.dtype, bias: bool = True) -> QuantizedLinear:
    layer = QuantizedLinear(64, 96, bias, scheme, "mlp.up_proj")
    layer.reset_parameters(0.05)
    torch.nn.init.uniform_(layer.weight_scale, 1e-3, 2e-3)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    layer.to(dtype).prepare()
    return layer


def exact(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """Of the same numbers, in float64."""
    if layer.scheme == "w8a8":
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        x = (x.float() / scale).round().double() * scale.double()
    y = x.double() @ (layer.weight.double() * layer.weight_scale.double()).mT
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (1, 1, 64), (0, 4, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_what_its_integers_and_scales_say(scheme, dtype, shape, bias):
    torch.manual_seed(0)
    layer, x = layer_of(scheme, dtype, bias), torch.randn(shape).to(dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (*shape[:-1], 96))
    torch.testing.assert_close(y.double(), exact(layer, x), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_of_a_layer_are_rows_of_its_result(scheme, dtype):
    layer, x, other = layer_of(scheme, dtype), torch.randn(2, 5, 64).to(dtype), torch.randn(2, 1, 64).to(dtype)
    first, second = layer.parts([other, x], [32, 64])
    torch.testing.assert_close(first, layer(other)[..., :32])
    torch.testing.assert_close(second, layer(x)[..., 32:])


def test_rows_are_quantised_once():
    rows = quantise(torch.randn(2, 3, 64))
    assert quantise(rows) is rows
    assert (rows.values.dtype, rows.shape, rows.scale.shape) == (torch.int8, (2, 3, 64), (2, 3))


def test_parameters_are_integers_and_scales_and_need_no_gradient():
    layer = layer_of("w8a16", torch.bfloat16)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.named_parameters()}
    assert found == {
        "weight": (torch.int8, (96, 64)),
        "weight_scale": (torch.bfloat16, (96, 1)),
        "bias": (torch.bfloat16, (96,)),
    }
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert list(layer.state_dict()) == list(found)
    assert "scheme=w8a16" in repr(layer)


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_random_weights_have_about_the_size_that_was_asked_for(std):
    layer = QuantizedLinear(64, 96, True, "w8a8", "mlp.up_proj")
    layer.prepare()
    layer.reset_parameters(std)
    assert layer.wide_scale is layer.wide_bias is None
    weight = layer.weight.float() * layer.weight_scale
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert weight.mean().abs() < 0.1 * std
    assert layer.weight.min() >= -127
    assert not layer.bias.any()
    with torch.inference_mode():  # they outlive the call
        layer.prepare()
    for copied in (layer.wide_scale, layer.wide_bias):
        assert not copied.requires_grad
        assert not copied.is_inference()


@pytest.mark.parametrize("change", ["dtype", "state", "copy"])
def test_the_copies_in_float32_follow_the_parameters(change):
    layer = layer_of("w8a8", torch.float32)
    if change == "dtype":
        layer.to(torch.float16)
    elif change == "state":
        layer.load_state_dict({name: tensor * 0 + 3 for name, tensor in layer.state_dict().items()})
    else:
        layer = copy.deepcopy(layer)
        assert layer.wide_scale is not None
        layer.to(torch.bfloat16)
    assert layer.wide_scale is None
    with pytest.raises(AssertionError, match="prepare"):
        layer(torch.ones(1, 64))
    layer.prepare()
    assert torch.equal(layer.wide_scale, layer.weight_scale.float().flatten())
    assert torch.equal(layer.wide_bias, layer.bias.float())


@pytest.mark.parametrize(("inputs", "outputs"), [(65536, 8), (8, 65536)])
def test_products_that_are_too_large_are_refused_by_name(inputs, outputs):
    with pytest.raises(UnsupportedError, match=rf"w8a8: mlp.gate_proj has {inputs} inputs and {outputs} .* 65535"):
        QuantizedLinear(inputs, outputs, False, "w8a8", "mlp.gate_proj")
    QuantizedLinear(min(inputs, 65535), min(outputs, 65535), False, "w8a8", "mlp.gate_proj")


# ---- models ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_product_of_the_layers_and_no_other_is_of_8_bits(scheme):
    model = Qwen2ForCausalLM(quantised_config(scheme))
    assert model.optimizations.names() == (*LADDER, scheme)
    kinds = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert set(products(model)) == {f"model.layers.{layer}.{kind}" for layer in range(3) for kind in kinds}
    assert type(model.lm_head) is Linear
    floating = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    assert {name for name, _ in model.named_parameters()} - floating == {f"{name}.weight" for name in products(model)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_head_stays_as_it_is_whatever_its_size(scheme):
    """A vocabulary of 152,064 is more than a product of 8-bit weights takes."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(quantised_config(scheme, vocab_size=152_064, num_hidden_layers=1))
    assert model.lm_head.weight.shape == (152_064, 256)
    assert model.lm_head.weight.is_floating_point()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_that_is_too_wide_once_fused_is_refused_with_the_way_out(scheme):
    config = quantised_config(scheme, intermediate_size=40_000, num_hidden_layers=1)
    with torch.device("meta"):
        with pytest.raises(UnsupportedError, match=r"mlp.gate_proj .* 80000 outputs, .* switch fused_gate_up"):
            Qwen2ForCausalLM(config)
        apart = Optimizations.up_to("ifa_tiling").replace(**{scheme: True})
        assert len(products(Qwen2ForCausalLM(config, apart))) == 5


def ladder(scheme: str) -> list[Optimizations]:
    """Each step of the ladder with 8-bit weights, from none on."""
    steps = [Optimizations.only(scheme), *(Optimizations.up_to(step).replace(**{scheme: True}) for step in LADDER)]
    if scheme == "w8a8":
        steps.append(Optimizations.up_to(scheme).replace(separate_norm_quant=True))
    return steps


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_plain_model_is_the_stock_one_with_dequantised_weights(scheme):
    plain = quantised_model(quantised_config(scheme), Optimizations.only(scheme))
    stock = Qwen2ForCausalLM.from_state_dict(small_config(), dequantised(plain), optimizations=Optimizations.none())
    if scheme == "w8a8":
        for name in products(plain):
            stock.get_submodule(name).register_forward_pre_hook(fake_quantised)
    assert_alike(plain(IDS).logits, stock(IDS).logits, plain)


def assert_alike(found: torch.Tensor, expected: torch.Tensor, plain: Any) -> None:
    """Equal within what float32 rounds. A value in the middle between two integers of 8 bits may become the other one:
    under w8a8 so few positions do that most are equal, and by less than it changes the logits to quantise at all.
    """
    worst = (found - expected).abs().amax(-1)
    if not plain.optimizations.w8a8:
        assert worst.max() < 1e-4
        return
    assert worst.median() < 1e-4
    assert worst.max() < (like(plain, Optimizations.only("w8a16"))(IDS).logits - expected).abs().max()


def fake_quantised(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """As the compressed-tensors format means dynamic activations per token."""
    x, *rest = inputs
    scale = x.abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() * scale, *rest)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_step_of_the_ladder_computes_the_same(scheme):
    plain = quantised_model(quantised_config(scheme), Optimizations.only(scheme))
    expected, tokens = plain(IDS).logits, plain.generate(IDS, max_new_tokens=6, do_sample=False)
    for optimizations in ladder(scheme)[1:]:
        model = like(plain, optimizations)
        assert_alike(model(IDS).logits, expected, plain)
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), tokens), optimizations.names()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_decode_step_is_the_last_position_of_a_longer_prompt(scheme, dtype):
    model = quantised_model(quantised_config(scheme), dtype=dtype)
    cache = model.allocate_cache(2, 16)
    model(IDS[:, :-1], past_key_values=cache)
    step = model(IDS[:, -1:], past_key_values=cache).logits[:, -1]
    whole = model(IDS).logits[:, -1]
    assert (step.dtype, model.dtype) == (whole.dtype, dtype)
    assert (step - whole).float().abs().max() < 60 * torch.finfo(dtype).eps


SHARED = {"npu_rms_norm": 1, "npu_prompt_flash_attention": 3}
COUNTS = {
    "w8a16": {"npu_weight_quant_batchmatmul": 12, "npu_add_rms_norm": 6, "npu_swiglu": 3},
    "w8a8": {
        "npu_quant_matmul": 12, "npu_add_rms_norm_dynamic_quant": 5, "npu_add_rms_norm": 1,
        # The first layer's norm has nothing to add; and what goes to o_proj.
        "npu_dynamic_quant": 1 + 3, "npu_dequant_swiglu_quant": 3,
    },
    "separate_norm_quant": {
        "npu_quant_matmul": 12, "npu_add_rms_norm": 6, "npu_dynamic_quant": 6 + 3, "npu_dequant_swiglu_quant": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", COUNTS)
def test_which_operators_compute_a_prompt(kind):
    """One quantisation for q, k and v, and one for gate and up."""
    scheme = kind if kind in SCHEMES else "w8a8"
    optimizations = Optimizations.up_to(scheme).replace(separate_norm_quant=kind not in SCHEMES)
    model = quantised_model(quantised_config(scheme), optimizations, torch.bfloat16)
    with Called() as called:
        model(IDS, use_cache=False)
    counts = {name: count for name, count in called.counts.items() if "rotary" not in name}
    assert counts == {**SHARED, **COUNTS[kind]}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "ignored", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.down_proj", "mlp.gate_proj mlp.up_proj"]
)
def test_modules_that_the_checkpoint_leaves_out(ignored, scheme):
    names = [f"model.layers.1.{name}" for name in ignored.split()]
    config = quantised_config(scheme, ignore=("lm_head", *names))
    plain = quantised_model(config, Optimizations.only(scheme))
    for optimizations in (Optimizations.only(scheme), Optimizations.up_to(scheme)):
        model = like(plain, optimizations)
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-2, atol=2e-2)
        layers = model.model.layers
        kept = {type(module) for name, module in layers[1].named_modules() if _stands_for(name, ignored)}
        assert not any(issubclass(kind, QuantizedLinear) for kind in kept)
        assert kept
        norms = [isinstance(layers[1].input_layernorm, QuantizingRMSNorm)]
        norms += [isinstance(layers[1].post_attention_layernorm, QuantizingRMSNorm)]
        eight = scheme == "w8a8"
        assert norms == [eight and "q_proj" not in ignored, eight and "gate_proj" not in ignored]


def _stands_for(module: str, ignored: str) -> bool:
    fused = {"self_attn.qkv_proj": "self_attn.q_proj", "mlp.gate_up_proj": "mlp.gate_proj"}
    return fused.get(module, module) in ignored.split()


def test_w8a16_of_a_checkpoint_made_for_w8a8_leaves_activations_alone():
    model = Qwen2ForCausalLM(quantised_config("w8a8"), Optimizations.up_to("w8a16"))
    assert {layer.scheme for layer in products(model).values()} == {"w8a16"}
    assert not any(isinstance(module, QuantizingRMSNorm) for module in model.modules())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float_checkpoint_is_refused_before_anything_is_built(scheme):
    with pytest.raises(UnsupportedError, match=rf"{scheme}: the weights of this checkpoint are not quantised"):
        Qwen2ForCausalLM(small_config(), Optimizations.up_to(scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_the_step_the_model_has_ordinary_weights(scheme):
    model = Qwen2ForCausalLM(quantised_config(scheme), Optimizations.all())
    assert not products(model)
    assert all(parameter.is_floating_point() for parameter in model.parameters())


def test_the_decoder_shares_the_prepared_layers():
    model = quantised_model(quantised_config("w8a8"))
    hidden = model.get_decoder()(IDS, use_cache=False)[0]
    assert torch.equal(model.lm_head(hidden), model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("place", [0, -1])
def test_a_layer_whose_weights_were_replaced_is_prepared_again(place):
    model = quantised_model(quantised_config("w8a8"))
    expected = model(IDS).logits
    layer = list(products(model).values())[place]
    layer.load_state_dict(layer.state_dict())
    assert layer.wide_scale is None
    assert torch.equal(model(IDS).logits, expected)


def test_hidden_states_are_not_quantised():
    model = quantised_model(quantised_config("w8a8"))
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert not any(isinstance(state, QuantizedRows) for state in states)
