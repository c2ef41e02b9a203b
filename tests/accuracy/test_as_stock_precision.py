"""In which dtype, and on which device, a model is loaded and computes: as asked, or refused by name."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu import LADDER, Optimizations, Qwen2ForCausalLM, Qwen2Model
from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models import arguments, pretrained
from tests.unit.small import small_config, small_stock, stock_weights
from tests.unit.tokens import assert_same_tokens

SWITCHES = [Optimizations.none(), *map(Optimizations.only, LADDER), Optimizations.all()]


@pytest.fixture(scope="module")
def stock():
    return small_stock()


@pytest.fixture(scope="module")
def folder(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp("stock")
    stock.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 199, (3, 12), generator=torch.Generator().manual_seed(1))


# ---- torch's default device ------------------------------------------------------------------------------------------
def test_a_model_goes_to_the_default_device(folder, stock, device):
    """As the stock class puts it there, with accelerate on 5.x. A device that is named comes first."""
    expected = Qwen2ForCausalLM.from_pretrained(folder, device=device)
    ids = torch.arange(1, 9, device=device)[None]
    with torch.device(device):
        within = Qwen2ForCausalLM.from_pretrained(folder)
        of_tensors = Qwen2Model.from_state_dict(stock.config, stock_weights(stock))
        named = Qwen2ForCausalLM.from_pretrained(folder, device="cpu")
        mapped = Qwen2ForCausalLM.from_pretrained(folder, device_map="cpu")
        tokens = within.generate(ids, max_new_tokens=3, do_sample=False)
    torch.set_default_device(device)
    try:
        default = Qwen2ForCausalLM.from_pretrained(folder)
    finally:
        torch.set_default_device(None)
    assert within.device == default.device == of_tensors.device == expected.device
    assert named.device.type == mapped.device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(within(ids).logits, expected(ids).logits)
    assert_same_tokens(tokens, expected.generate(ids, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize("spread", pretrained.ACCELERATOR_MAPS)
def test_spread_over_accelerators_is_the_current_one(folder, spread):
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    expected = "cpu" if accelerator is None else accelerator.type
    assert Qwen2ForCausalLM.from_pretrained(folder, device_map=spread).device.type == expected


def test_the_meta_device_is_refused(folder):
    """The stock class on 5.x refuses it, too. The default device is looked at: none of ours is meta by accident."""
    with torch.device("meta"):
        with pytest.raises(UnsupportedError, match=r"^torch's default device is 'meta': not usable here"):
            Qwen2ForCausalLM.from_pretrained(folder)
        assert Qwen2ForCausalLM.from_pretrained(folder, device="cpu").device.type == "cpu"


# ---- autocast --------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
def test_autocast_to_another_dtype_is_refused(stock, ids, device, optimizations):
    model = Qwen2ForCausalLM.from_state_dict(
        stock.config, stock_weights(stock), device=device, optimizations=optimizations
    )
    given = ids.to(device)
    expected = model(given).logits
    message = rf"^torch\.autocast\('{model.device.type}', dtype=torch\.bfloat16\) around a model of torch\.float32: .*"
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        with pytest.raises(UnsupportedError, match=message + r"load it with dtype='bfloat16', or call it outside"):
            model(given)
        with pytest.raises(UnsupportedError, match=message):
            model.generate(given, max_new_tokens=2)
        with pytest.raises(UnsupportedError, match=message):
            model.get_decoder()(given)
        with torch.autocast(model.device.type, enabled=False):
            assert torch.equal(model(given).logits, expected)
    half = model.bfloat16()
    expected = half(given).logits
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        assert (half(given).logits - expected).abs().max() < 0.2  # a few of the steps of bfloat16 at these values


@torch.no_grad()
def test_autocast_of_another_device_does_not_matter(stock, ids):
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), device="cpu")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=False), torch.autocast("cpu", enabled=False):
        model(ids)


# ---- float64 ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizations", SWITCHES, ids=str)
def test_float64_is_refused_everywhere(stock, ids, device, optimizations):
    """No NPU computes in it; by small operators it gave NaN for padded rows, and by fused ones an operator's error."""
    model = Qwen2ForCausalLM.from_state_dict(
        stock.config, stock_weights(stock), device=device, optimizations=optimizations
    )
    message = (
        r"^the weights are torch\.float64, and an NPU computes in float32, bfloat16 and float16 alone: call model\."
    )
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0).to(device)
    model.double()
    with pytest.raises(UnsupportedError, match=message):
        model(ids.to(device), attention_mask=mask)
    with pytest.raises(UnsupportedError, match=message):
        model.generate(ids.to(device), attention_mask=mask, max_new_tokens=2)
    model.float()
    with torch.no_grad():
        assert torch.isfinite(model(ids.to(device), attention_mask=mask).logits[:, 2:]).all()


def test_float64_is_not_loaded(folder, stock, tmp_path):
    small_stock(dtype=torch.float64).save_pretrained(tmp_path, safe_serialization=True)
    stored = r"^the weights are torch\.float64, .*: pass dtype='float32'$"
    for optimizations in (Optimizations.none(), Optimizations.all()):
        with pytest.raises(UnsupportedError, match=stored):
            Qwen2ForCausalLM.from_pretrained(tmp_path, optimizations=optimizations)
        with pytest.raises(UnsupportedError, match=stored):
            Qwen2ForCausalLM.from_state_dict(
                stock.config, stock_weights(stock), dtype=torch.float64, optimizations=optimizations
            )
    for name in ("float64", "torch.float64", torch.float64, "int8", torch.int8):
        with pytest.raises(UnsupportedError, match=r"dtype=.*; supported are float32, bfloat16, float16 and 'auto'"):
            Qwen2ForCausalLM.from_pretrained(folder, dtype=name)
    assert Qwen2ForCausalLM.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32


# ---- an accelerator runs ahead of the program --------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["growing", "fixed"])
def test_a_decode_step_does_not_wait_for_a_device(ids, device, optimizations, monkeypatch):
    """So its values are looked into on the CPU alone, at the last position, too; a longer continuation's everywhere."""
    if device == "cpu":
        pytest.skip("the CPU is nobody to wait for")
    stock = small_stock(small_config(max_position_embeddings=13))
    model = Qwen2ForCausalLM.from_state_dict(
        stock.config, stock_weights(stock), device=device, optimizations=optimizations
    )
    given = ids.to(device)
    first = model(given, use_cache=True)
    with pytest.raises(ValueError, match="is outside the vocabulary of 199"):
        model(given[:, :2] + 300, past_key_values=cache_of(first))
    monkeypatch.setattr(arguments, "_extremes", lambda values: pytest.fail("it was looked into"))
    monkeypatch.setattr(arguments, "check_mask_values", lambda mask: pytest.fail("the mask was looked into"))
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read(self) if self.is_cpu else pytest.fail("it waits"))
    place = torch.full((3, 1), 12, device=device)
    model(
        given[:, :1],
        attention_mask=torch.ones(3, 13, device=device),
        position_ids=place,
        **{CACHE_NAME: cache_of(first)},
    )
