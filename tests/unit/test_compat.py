"""What the installed transformers gives no baseline for is refused; the rest is read the same from both versions."""

from __future__ import annotations

import re

import pytest
import torch

from qwen2_npu import Qwen2ForCausalLM, compat
from qwen2_npu.errors import UnsupportedError
from tests.unit.small import V4, small_config, small_stock


def test_rope_frequencies_are_the_stock_ones():
    config = small_config()
    frequencies, scaling = compat.rope_frequencies(config)
    stock = small_stock(config)
    theirs = (stock.model.layers[0].self_attn if V4 else stock.model).rotary_emb.inv_freq
    assert torch.equal(frequencies, theirs)
    assert scaling == 1.0


@pytest.mark.skipif(not V4, reason="5.x has a baseline for both")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, r"use_sliding_window=True: transformers 4\.37\.0's own .*transformers>=5"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling=.*ignores it.*transformers>=5"),
    ],
)
def test_4_37_refuses_what_it_computes_wrong(changes, message):
    with pytest.raises(UnsupportedError, match=message):
        Qwen2ForCausalLM(small_config(**changes))


@pytest.mark.skipif(V4, reason="4.37.0 refuses rope scaling altogether")
def test_frequencies_that_change_with_the_sequence_are_refused():
    config = small_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UnsupportedError, match=r"rope_type='dynamic'.*supported are default, linear, yarn"):
        Qwen2ForCausalLM(config)


@pytest.mark.parametrize("version", ["4.36.2", "4.38.0", "4.57.6", "6.0.0.dev0"])
def test_other_versions_are_refused_with_the_way_out(version):
    message = rf"transformers {re.escape(version)} is not served.*pip install transformers==5\.24\.0"
    with pytest.raises(UnsupportedError, match=message):
        compat.check_version(version)


@pytest.mark.parametrize("version", ["4.37.0", "4.37.2", "5.0.0", "5.23.0", "5.24.0", "5.100.1"])
def test_what_is_served_is_not_refused(version):
    compat.check_version(version)


def test_the_cache_has_one_name_per_call():
    cache = object()
    assert compat.one_cache(cache, None) is compat.one_cache(None, cache) is cache
    assert compat.one_cache(None, None) is None
    with pytest.raises(ValueError, match="two names of one argument"):
        compat.one_cache(cache, cache)


def test_the_stock_model_takes_and_returns_the_cache_under_its_name():
    stock = small_stock(small_config())
    ids = torch.ones(1, 3, dtype=torch.int64)
    first = stock(ids, use_cache=True)
    cache = compat.cache_of(first)
    assert cache is not None
    both = stock(torch.ones(1, 4, dtype=torch.int64)).logits[:, -1]
    assert torch.allclose(stock(ids[:, :1], **{compat.CACHE_NAME: cache}).logits[:, -1], both, atol=1e-5)
