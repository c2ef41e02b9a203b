"""What attention tells the operators of a prompt beside q, k and v: which entries of the mask count, and which band."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.conformance.accuracy.intermediates import npu_operator
from tests.unit.small import V4, small_config, small_stock, stock_weights

ALL_COUNT, CAUSAL, BAND, AS_IT_IS = 1, 2, 4, 0
"""sparse_mode in the operators' documentation: allMask, leftUpCausal, band, defaultMask."""
NO_LIMIT = 2**31 - 1
OPERATORS = ("npu_prompt_flash_attention", "npu_fused_infer_attention_score")


class Told(TorchFunctionMode):
    """Of each call of an operator for prompts: sparse_mode, pre_tokens, next_tokens, and the mask's last two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int, int, tuple[int, ...] | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if npu_operator(func) in OPERATORS and "sparse_mode" in kwargs:
            mask = kwargs["atten_mask"]
            band = (kwargs["sparse_mode"], kwargs["pre_tokens"], kwargs["next_tokens"])
            self.calls.append((*band, None if mask is None else tuple(mask.shape[-2:])))
        return func(*args, **(kwargs or {}))


SWITCHES = {
    "masks": Optimizations.up_to("swiglu").replace(last_token_logits=False),
    "all layers": Optimizations.up_to("last_layer").replace(last_layer=False),
}
COMPRESSED = (2048, 2048)
WHOLE = (ALL_COUNT, NO_LIMIT, NO_LIMIT)
EXPECTED = {
    ("masks", None): [(*WHOLE, (9, 9))] * 2,
    ("all layers", None): [(CAUSAL, NO_LIMIT, 0, COMPRESSED)] * 2,
    ("masks", 4): [(*WHOLE, (9, 9))] * 2,
    ("all layers", 4): [(BAND, 3, 0, COMPRESSED)] * 2,
}


def model_of(switches: str, window: int | None) -> Qwen2ForCausalLM:
    changes = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    stock = small_stock(small_config(num_hidden_layers=2, **changes))
    return Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=SWITCHES[switches])


@pytest.mark.parametrize(
    ("switches", "window"),
    [
        pytest.param(*case, marks=pytest.mark.skipif(V4 and case[1] is not None, reason="4.37.0 has no window here"))
        for case in EXPECTED
    ],
)
@torch.no_grad()
def test_the_mask_and_the_band_of_a_prompt_and_of_what_follows_it(switches, window):
    """Of a continuation every entry of a whole mask counts, whatever was derived in the prompt."""
    model, ids = model_of(switches, window), torch.arange(1, 13)[None]
    cache = model.allocate_cache(1, 64)
    with Told() as prompt:
        model(ids[:, :9], **{CACHE_NAME: cache})
    assert prompt.calls == EXPECTED[switches, window]
    with Told() as more:
        model(ids[:, 9:], **{CACHE_NAME: cache})
    assert more.calls == [(*WHOLE, (3, cache.shape.capacity))] * 2


@torch.no_grad()
def test_a_single_query_is_told_no_band():
    """Of a prompt of one token, which sees itself alone, there is no mask either."""
    with Told() as found:
        model_of("masks", None)(torch.tensor([[5]]))
    assert [(mode, mask) for mode, _, _, mask in found.calls] == [(AS_IT_IS, None)] * 2


@pytest.mark.skipif(V4, reason="4.37.0 has hidden_size / num_attention_heads always")
@pytest.mark.parametrize("size", [32, 96, 128])
@pytest.mark.parametrize("step", ["none", "fixed_kv_cache", "flash_attention", "all", "fused_infer_attention"])
@torch.no_grad()
def test_heads_have_the_size_that_the_configuration_names(size, step):
    """Not that of hidden_size shared among them: the scale of the scores, the angles and the cache follow it."""
    switches = {"none": Optimizations.none(), "all": Optimizations.all()}
    optimizations = switches.get(step) or Optimizations.only(step)
    stock, ids = small_stock(small_config(num_hidden_layers=1, head_dim=size)), torch.arange(1, 19).view(2, 9)
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
    cache, expected = model.allocate_cache(2, 9), stock(ids).logits
    passes = [model(ids[:, part], **{CACHE_NAME: cache}).logits for part in (slice(5), slice(5, 8), slice(8, 9))]
    assert (torch.cat(passes, dim=1) - expected).abs().max() < 2e-4  # as in test_qwen2.py
