"""Names that are not the stock model's, one by one and in parts."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen2Model

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import naming
from qwen2_npu.checkpoint.naming import EMBEDDING, HEAD, Renamed, as_stock, stock_names
from qwen2_npu.checkpoint.sources import SafetensorsSource, StateDictSource, open_checkpoint, part_of
from qwen2_npu.checkpoint.weights import cut_for, skeleton
from qwen2_npu.compat import IS_V4
from qwen2_npu.errors import CheckpointError
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import Shard
from tests.unit.small import small_config, small_stock, stock_weights

CONFIG = small_config(tie_word_embeddings=True)
STOCK = small_stock(CONFIG)
WEIGHTS = stock_weights(STOCK)
LAYER = "layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What transformers saves of a base model."""
    folder = tmp_path_factory.mktemp("base")
    model = Qwen2Model(CONFIG)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in WEIGHTS.items()})
    model.save_pretrained(folder, max_shard_size="300KB", safe_serialization=True)
    return folder


def test_a_base_model(base):
    model = Qwen2ForCausalLM.from_pretrained(base)
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in model.stock_state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_base_model_has_no_head(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"1 tensors missing, first lm_head\.weight; a base model has none: save"):
        Qwen2ForCausalLM.from_pretrained(base, tie_word_embeddings=False)


def test_parts_of_renamed_tensors(base):
    """What a rank reads, and what is asked for by name."""
    source = open_checkpoint(base)
    assert isinstance(source, Renamed)
    assert isinstance(source.inner, SafetensorsSource)
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
    assert source.stored_dtype() == torch.float32
    cut = cut_for(skeleton(lambda: Qwen2ForCausalLM(CONFIG, None, Ranks(Shard(1, 2))), source))
    assert any(cut(name) is not None for name in WEIGHTS)
    found = dict(source.tensors(cut))
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensor, part_of(WEIGHTS[name], cut(name))) for name, tensor in found.items())
    for names in ([], [EMBEDDING], list(WEIGHTS)):
        read = source.read(names)
        assert read.keys() == set(names)
        assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in read.items())


def test_parts_are_asked_for_by_the_stock_names(base):
    asked: list[str] = []
    source = open_checkpoint(base)
    found = dict(source.tensors(lambda name: asked.append(name)))
    assert sorted(asked) == sorted(found) == sorted(WEIGHTS)


def test_usual_names_cost_nothing():
    source = StateDictSource(CONFIG, WEIGHTS)
    assert as_stock(source) is source
    assert source.config is CONFIG


# ---- names ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stored", "v5", "v4"),
    [
        ([LAYER, "norm.weight"], [f"model.{LAYER}", "model.norm.weight"], [f"model.{LAYER}", "model.norm.weight"]),
        ([f"model.{LAYER}", "norm.weight"], [f"model.{LAYER}", "model.norm.weight"], [f"model.{LAYER}", "norm.weight"]),
        ([f"model.model.{LAYER}"], [f"model.{LAYER}"], [f"model.model.{LAYER}"]),
        ([f"model.{HEAD}", f"model.{LAYER}"], [HEAD, f"model.{LAYER}"], [f"model.{HEAD}", f"model.{LAYER}"]),
        (["score.weight", LAYER], ["score.weight", f"model.{LAYER}"], ["score.weight", f"model.{LAYER}"]),
        ([LAYER, "model.norm.weight"], [f"model.{LAYER}", "model.norm.weight"], [LAYER, "model.norm.weight"]),
        (["modelled", LAYER], ["modelled", f"model.{LAYER}"], ["modelled", LAYER]),
        (["normal.weight", "layers", "h.0"], ["normal.weight", "layers", "h.0"], ["normal.weight", "layers", "h.0"]),
        ([f"model.model.model.{LAYER}"], [f"model.model.model.{LAYER}"], [f"model.model.model.{LAYER}"]),
    ],
)  # fmt: skip
def test_names_as_the_installed_transformers_finds_them(stored, v5, v4):
    assert list(stock_names(stored, where="x", tied=False).values()) == (v4 if IS_V4 else v5)
    for names_of, expected in ((naming._names_of_v4, v4), (naming._names_of_v5, v5)):
        assert names_of(stored, "x") == dict(zip(stored, expected, strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_alone_is_the_embedding_where_they_are_tied(tied):
    assert stock_names([HEAD], where="x", tied=tied) == {HEAD: EMBEDDING if tied else HEAD}
    assert stock_names([HEAD, EMBEDDING], where="x", tied=tied) == {HEAD: HEAD, EMBEDDING: EMBEDDING}


@pytest.mark.skipif(IS_V4, reason="transformers 4.37.0 knows one of the two names")
@pytest.mark.parametrize("stored", [
    ["norm.weight", "model.norm.weight"], ["model.norm.weight", "norm.weight"],
    ["model.model.norm.weight", "norm.weight"],
])  # fmt: skip
def test_two_tensors_that_are_one(stored):
    """transformers takes one of them, and says nothing."""
    with pytest.raises(CheckpointError, match=rf"x: {stored[0]} and {stored[1]} are both the model's model\.norm"):
        stock_names(stored, where="x", tied=False)


def test_a_head_beside_the_tensors_of_a_base_model_is_refused_as_4_37_refuses_it():
    """Whichever version is installed: it is text that decides."""
    with pytest.raises(CheckpointError, match=rf"x: {LAYER} has no 'model\.' before it.*which no base model has"):
        naming._names_of_v4([LAYER, HEAD], "x")
    assert naming._names_of_v4([LAYER], "x") == {LAYER: f"model.{LAYER}"}


# ---- ties -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["a copy", "the same", "in another dtype"])
def test_a_head_that_is_the_embedding(kind):
    embedding = WEIGHTS[EMBEDDING].bfloat16().float()
    head = {"a copy": embedding.clone(), "the same": embedding, "in another dtype": embedding.bfloat16()}[kind]
    source = StateDictSource(CONFIG, WEIGHTS | {EMBEDDING: embedding, HEAD: head})
    assert as_stock(source).config is CONFIG


@pytest.mark.parametrize("changed", [HEAD, EMBEDDING])
@pytest.mark.parametrize(
    "change",
    [lambda same: same + 1, lambda same: same[:-1], lambda same: same.bfloat16()],
    ids=["values", "shape", "rounded"],
)
def test_a_head_that_is_not_the_embedding(change, changed):
    both = dict.fromkeys((EMBEDDING, HEAD), WEIGHTS[EMBEDDING])
    source = StateDictSource(copy.deepcopy(CONFIG), WEIGHTS | both | {changed: change(WEIGHTS[EMBEDDING])})
    given = source.config
    if IS_V4:
        with pytest.raises(
            CheckpointError,
            match=r"^the state dict does not fit its configuration: lm_head\.weight differs from model\.embed_tokens",
        ):
            as_stock(source)
    else:
        assert as_stock(source).config.tie_word_embeddings is False
    assert given.tie_word_embeddings is True
