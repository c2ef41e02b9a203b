"""A stock model without memory, and its weights; what AutoTP makes of it is in tests/accuracy/parallel_ranks.py."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.checkpoint.sources import StateDictSource
from qwen2_npu.conformance.accuracy.stock import uninitialised
from qwen2_npu.parallel.collectives import ALONE, Ranks
from qwen2_npu.parallel.sharding import Shard
from qwen2_npu.parallel.stock import filled, hollow
from tests.unit.small import small_config, small_stock, stock_weights

CPU = torch.device("cpu")


def bytes_of(model: torch.nn.Module) -> int:
    return sum({p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


@pytest.mark.parametrize("tied", [False, True])
def test_a_hollow_model_takes_no_memory_and_is_filled_bit_for_bit(tied: bool) -> None:
    config = small_config(tie_word_embeddings=tied)
    stock = small_stock(config)
    model = hollow(uninitialised(config, torch.float32), torch.float32, CPU)
    count = len(list(model.parameters()))
    assert bytes_of(model) <= 4 * count
    state = {**stock_weights(stock), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    found = filled(model, StateDictSource(config, state), ALONE).eval()
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(found(tokens).logits, stock(tokens).logits)


def test_parts_have_the_dtype_of_the_model_and_memory_of_their_own() -> None:
    """A part that is a view would hold the whole tensor."""
    config = small_config()
    weights = stock_weights(small_stock(config))
    model = hollow(uninitialised(config, torch.bfloat16), torch.bfloat16, CPU)
    filled(model, StateDictSource(config, weights), ALONE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model = hollow(uninitialised(config, torch.float32), torch.float32, CPU)
    filled(model, StateDictSource(config, weights), ALONE)
    theirs = {weight.untyped_storage().data_ptr() for weight in weights.values()}
    assert not theirs & {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_a_head_that_autotp_cut_from_a_tied_embedding_is_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tie_word_embeddings=True)
    weights = stock_weights(small_stock(config))
    model = hollow(uninitialised(config, torch.float32), torch.float32, CPU)
    columns = config.hidden_size // 4  # of rank 0; AutoTP's parts need not be equal
    head = torch.zeros(()).expand(config.vocab_size, config.hidden_size - columns)
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    monkeypatch.setattr("qwen2_npu.parallel.stock.of_all_ranks", lambda sizes: [dict.fromkeys(sizes, columns), sizes])
    found = filled(model, StateDictSource(config, weights), Ranks(Shard(1, 2)))
    embedding = weights["model.embed_tokens.weight"]
    assert torch.equal(found.model.embed_tokens.weight, embedding)
    assert torch.equal(found.lm_head.weight, embedding[:, columns:])
