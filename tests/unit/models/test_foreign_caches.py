"""Caches that a call cannot go on from, and programs that look into the fixed one as into the stock model's."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.cache import CacheShape, FixedKVCache
from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.errors import UnsupportedError
from tests.unit.small import V4, small_config, small_stock, stock_weights

PROMPT = {"input_ids": torch.randint(1, 199, (3, 11), generator=torch.Generator().manual_seed(3))}
SWITCHES = {
    "none": Optimizations.none(),
    "fixed_kv_cache": Optimizations.only("fixed_kv_cache"),
    "all": Optimizations.all(),
}


@pytest.fixture(scope="module", params=SWITCHES)
def model(request):
    stock = small_stock()
    weights = stock_weights(stock)
    return Qwen2ForCausalLM.from_state_dict(stock.config, weights, optimizations=SWITCHES[request.param])


def foreign_caches(model):
    """Caches that are not the one of this model, and what they are called."""
    from transformers import cache_utils

    if model.optimizations.fixed_kv_cache:
        yield cache_utils.DynamicCache(), "a DynamicCache"
        other = "none" if model.optimizations.flash_attention else "all"
        layout = {"none": "BNSD", "all": "BSND"}[other]
        shape = dataclasses.replace(model.cache_shape(3, 64), layout=layout)
        yield FixedKVCache(shape), rf"the KV cache {layout}: .* this model writes a KV cache"
        yield (
            FixedKVCache(dataclasses.replace(shape, layout=model.cache_shape(3, 64).layout, layers=1)),
            "the KV cache .* 1 layers",
        )
    else:
        yield FixedKVCache(model.cache_shape(3, 64)), "a FixedKVCache"
    if V4:
        yield cache_utils.SinkCache(8, 2), "a SinkCache"
        return
    config = small_config(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    yield cache_utils.StaticCache(config=small_config(), max_cache_len=64), "a StaticCache"
    if not model.optimizations.fixed_kv_cache:
        yield cache_utils.DynamicCache(config=config), "a DynamicCache of DynamicSlidingWindowLayer"


def test_another_cache_is_refused_before_it_is_written(model):
    for cache, message in foreign_caches(model):
        for call, more in ((model.forward, {}), (model.generate, {"max_new_tokens": 2})):
            with pytest.raises(UnsupportedError, match=rf"is {message}.*allocate_cache\(batch_size=…, capacity=…\)"):
                call(**PROMPT, past_key_values=cache, **more)
        assert cache.get_seq_length() == 0


def test_who_looks_for_layers_in_the_fixed_cache_is_told_where_they_are():
    cache = Qwen2ForCausalLM(small_config()).allocate_cache(2, 16)
    where = r"keys and values of a layer are key_cache\[layer\] and value_cache\[layer\], BSND of \(2, 128, 2, 64\)"
    for error, ask in (
        (AttributeError, lambda: cache.layers[0].keys),
        (TypeError, lambda: cache[0][0]),
        (TypeError, lambda: list(cache)),
        (TypeError, lambda: cache.update(torch.ones(1), torch.ones(1), 0)),
    ):
        with pytest.raises(error, match=where):
            ask()
    assert not hasattr(cache, "layers")


def test_a_prompt_that_the_cache_holds_already(model):
    ids = PROMPT["input_ids"]
    cache = model.allocate_cache(3, 32)
    with torch.no_grad():
        model(ids, use_cache=True, **{CACHE_NAME: cache})
    for given in (ids, ids[:, :4]):
        with pytest.raises(ValueError, match=r"and the cache holds 11 already: pass the whole sequence, or the new"):
            model.generate(given, max_new_tokens=2, past_key_values=cache)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("field", sorted({f.name for f in dataclasses.fields(CacheShape)} - {"batch_size", "capacity"}))
def test_a_cache_of_a_model_that_differs_in_anything_is_refused(field):
    """Rows and slots alone are the caller's choice; a window that one of the two does not have is seen nowhere else."""
    model = Qwen2ForCausalLM(small_config(num_hidden_layers=2))
    own = model.cache_shape(3, 64)
    others: dict[str, Any] = {
        "layout": "BNSD", "dtype": torch.bfloat16, "device": torch.device("meta"), "sliding_window": 4,
    }  # fmt: skip
    other = dataclasses.replace(own, **{field: others.get(field) or getattr(own, field) * 2})
    cache = FixedKVCache(other)
    message = rf"is the {re.escape(other.describe())} on .*, and this model writes a {re.escape(own.describe())} on "
    with pytest.raises(UnsupportedError, match=message):
        model(**PROMPT, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 0
    assert field == "device" or other.describe() != own.describe()


@pytest.mark.parametrize("switches", ["fixed_kv_cache", "all"])
def test_a_cache_of_any_number_of_slots_is_served(switches):
    """Not only of those that allocate_cache rounds to."""
    model = Qwen2ForCausalLM(small_config(num_hidden_layers=1), SWITCHES[switches])
    expected = model(**PROMPT).logits
    cache = FixedKVCache(dataclasses.replace(model.cache_shape(3, 12), capacity=12))
    torch.testing.assert_close(model(**PROMPT, **{CACHE_NAME: cache}).logits, expected)
    assert cache.lengths == [11, 11, 11]
