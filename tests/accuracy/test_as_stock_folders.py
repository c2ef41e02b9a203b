"""A checkpoint folder means what it means to transformers: random folders, read by the stock class and by ours."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2ForCausalLM as StockQwen2

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint.sources import open_checkpoint
from qwen2_npu.compat import IS_V4
from qwen2_npu.conformance.accuracy.stock import stock_from_pretrained, stock_from_state_dict
from qwen2_npu.errors import CheckpointError
from tests.unit.small import small_config, small_stock

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

PIECES = 4
"""Groups of seeds: each is a test of its own, so that several processes share them."""

SEEDS = range(112, 160)

LAYOUTS = ("single", "shards", "stale shards", "pickled", "pickled shards", "variant")

Tensors = dict[str, torch.Tensor]


def config(tied: bool) -> Any:
    return small_config(
        num_hidden_layers=1, hidden_size=16, intermediate_size=8, vocab_size=13, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip


ORIGINAL: Tensors = {name: tensor.clone() for name, tensor in small_stock(config(False)).state_dict().items()}


@dataclass(frozen=True)
class Folder:
    """What a folder consists of."""

    tied: bool = False
    head: str = "other"  # "absent", "same" as the embedding, or "other"
    embedding: bool = True
    prefix: str = "model."  # before the names of the base model
    some: bool = False  # the prefix is before the norms' names alone
    extra: str = ""  # a tensor that no model has
    missing: bool = False
    layout: str = "single"
    dtype: torch.dtype = torch.float32
    others: tuple[str, ...] = ()

    @classmethod
    def random(cls, seed: int) -> Folder:
        choose = random.Random(seed)
        layout = choose.choice(LAYOUTS)
        others = tuple(name for name in OTHERS if choose.random() < 0.4)
        return cls(
            tied=choose.random() < 0.6,
            head=choose.choice(("absent", "same", "other")),
            embedding=choose.random() < 0.8,
            prefix=choose.choice(("model.", "model.", "model.", "", "model.model.")),
            some=choose.random() < 0.1,
            extra=choose.choice(("", "", "", "", "rotary_emb.inv_freq", "adapter.weight")),
            missing=choose.random() < 0.1,
            layout=layout,
            dtype=choose.choice((torch.float32, torch.bfloat16)),
            others=tuple(name for name in others if "pickled" not in layout or name != "pytorch_model.bin"),
        )

    def tensors(self) -> Tensors:
        """As they are stored."""
        found = dict(ORIGINAL)
        if not self.embedding:
            del found[EMBEDDING]
        if self.head == "absent":
            del found[HEAD]
        elif self.head == "same":
            found[HEAD] = ORIGINAL[EMBEDDING].clone()
        if self.missing:
            del found["model.layers.0.mlp.up_proj.weight"]
        stored = {self.stored_name(name): tensor.to(self.dtype) for name, tensor in found.items()}
        return stored | ({f"model.layers.0.self_attn.{self.extra}": torch.ones(8)} if self.extra else {})

    def stored_name(self, name: str) -> str:
        if name == HEAD or (self.some and "norm" not in name):
            return name
        return self.prefix + name.removeprefix("model.")

    def write(self, folder: Path) -> dict[str, Any]:
        """Returns: arguments that this layout takes, for ours and for the stock class."""
        config(self.tied).save_pretrained(folder)
        stored = self.tensors()
        for name in self.others:
            OTHERS[name](folder / name)
        if self.layout in ("single", "stale shards"):
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        if self.layout in ("shards", "stale shards"):
            shards(stored if self.layout == "shards" else stale(), folder, "model", "safetensors")
        if self.layout == "pickled":
            torch.save(stored, folder / "pytorch_model.bin")
        if self.layout == "pickled shards":
            shards(stored, folder, "pytorch_model", "bin")
        if self.layout == "variant":
            shards(stored, folder, "model", "safetensors", variant=".best")
        return ARGUMENTS.get(self.layout, Arguments({}, {}))._asdict()

    def refused(self) -> str | None:
        """Why ours refuses it; None where it is loaded."""
        names = self.tensors()
        base = any(re.match(r"(layers|norm|embed_tokens)\.", name) for name in names)
        without_prefix = base and not any(name.startswith("model") for name in names)
        if IS_V4 and without_prefix and HEAD in names:
            return r"has no 'model\.' before it, .*transformers 4\.37\.0 refuses that; install"
        if self.tied and self.head == "other" and self.embedding and IS_V4 and not self._unknown_to_v4("embed_tokens"):
            return r"lm_head\.weight differs from model\.embed_tokens\.weight, .*set tie_word_embeddings to false"
        if IS_V4 and (self._unknown_to_v4("norm") or self._unknown_to_v4("layers")):
            return "tensors missing, .*tensors unexpected"
        if self.missing or not (self.embedding or (self.tied and self.head != "absent")):
            return "tensors missing"
        if self.head == "absent" and not self.tied:
            return r"1 tensors missing, first lm_head\.weight.*a base model has none"
        return "tensors unexpected, first .*adapter" if self.extra == "adapter.weight" else None

    def _unknown_to_v4(self, module: str) -> bool:
        stored = self.stored_name("model.layers.0.input_layernorm.weight" if module == "layers" else f"model.{module}.")
        with_prefix = any(name.startswith("model") for name in self.tensors())
        return stored.startswith("model.model.") or (with_prefix and not stored.startswith("model."))


class Arguments(NamedTuple):
    ours: dict[str, Any]
    stock: dict[str, Any]


ARGUMENTS = {
    "pickled": Arguments({"weights_file": "pytorch_model.bin"}, {"use_safetensors": False}),
    "pickled shards": Arguments({"weights_file": "pytorch_model.bin.index.json"}, {"use_safetensors": False}),
    "variant": Arguments({"weights_file": "model.safetensors.index.best.json"}, {"variant": "best"}),
}


def stale() -> Tensors:
    """Weights of another checkpoint."""
    return {name: tensor + 1 for name, tensor in ORIGINAL.items()}


def shards(tensors: Tensors, folder: Path, stem: str, suffix: str, variant: str = "") -> None:
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        file = f"{stem}-{number:05}-of-00002{variant}.{suffix}"
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % 2 == number % 2}
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / f"{stem}.{suffix}.index{variant}.json").write_text(text)


OTHERS: dict[str, Callable[[Path], object]] = {
    "model.fp16.safetensors": lambda path: save_file(stale(), path, metadata={"format": "pt"}),
    "model_ema.safetensors": lambda path: save_file(stale(), path, metadata={"format": "pt"}),
    "model-best.safetensors": lambda path: save_file(stale(), path, metadata={"format": "pt"}),
    "model.safetensors.index.fp16.json": lambda path: path.write_text("{}"),
    "pytorch_model.bin": lambda path: torch.save(stale(), path),
    "optimizer.bin": lambda path: path.write_bytes(b"no weights"),
    "README.md": lambda path: path.write_text("A model."),
}
"""Files beside the weights, which neither class reads."""


def of_stock(folder: Path, arguments: dict[str, Any]) -> Tensors | None:
    """What the stock class reads; None where it refuses, or fills something with random values."""
    dtype = {"torch_dtype" if IS_V4 else "dtype": torch.float32}
    try:
        model, found = StockQwen2.from_pretrained(folder, output_loading_info=True, **dtype, **arguments)
    except (OSError, ValueError, RuntimeError):
        return None
    return None if found["missing_keys"] or found["mismatched_keys"] else model.state_dict()


def of_ours(model: Qwen2ForCausalLM) -> Tensors:
    return model.stock_state_dict() | {HEAD: model.lm_head.weight}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("piece", range(PIECES))
def test_the_tensors_that_load_are_those_of_stock(tmp_path, piece, monkeypatch):
    """Where ours refuses, it says why. What it then saves loads alike again, and nothing of others is gone."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # dozens of saves
    for seed in SEEDS[piece::PIECES]:
        made, folder = Folder.random(seed), tmp_path / str(seed)
        arguments = made.write(folder)
        others = {name: (folder / name).read_bytes() for name in made.others}
        stock, refused = of_stock(folder, arguments["stock"]), made.refused()
        if refused is not None:
            with pytest.raises(CheckpointError, match=refused) as caught:
                Qwen2ForCausalLM.from_pretrained(folder, **arguments["ours"])
            assert str(folder) in str(caught.value), made
            assert "\n" not in str(caught.value), made
            assert stock is None or "unexpected" in refused or "differs" in refused, made
            continue
        assert stock is not None, made
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments["ours"])
        assert same(of_ours(model), stock), made
        model.save_pretrained(folder, max_shard_size=random.Random(seed).choice(("2KB", "1GB")))
        saved = of_stock(folder, {})
        assert saved is not None, made
        assert same(saved, stock), made
        assert {name: (folder / name).read_bytes() for name in made.others} == others


def test_the_folders_are_of_every_kind():
    made = [Folder.random(seed) for seed in SEEDS]
    loaded = [each for each in made if each.refused() is None]
    assert {each.layout for each in loaded} == set(LAYOUTS)
    assert {(each.tied, each.head, each.embedding) for each in loaded} >= {
        (False, "other", True), (True, "absent", True), (True, "same", True), (True, "same", False),
    }  # fmt: skip
    assert IS_V4 or (True, "other", True) in {(each.tied, each.head, each.embedding) for each in loaded}
    assert {each.prefix for each in loaded} == ({"model.", ""} if IS_V4 else {"model.", "", "model.model."})
    assert len({each.refused() for each in made}) == (7 if IS_V4 else 4)


# ---- a tied model with a head of its own ----------------------------------------------------------------------------
@pytest.mark.skipif(IS_V4, reason="transformers 4.37.0 puts one of the two in the place of the other: refused")
def test_a_head_that_config_json_calls_tied(tmp_path):
    """It computes what the stock model computes, in the suites, too; and it is saved as what it is."""
    made = Folder(tied=True)
    made.write(tmp_path)
    ids = torch.arange(5).unsqueeze(0)
    ours = Qwen2ForCausalLM.from_pretrained(tmp_path)
    stock = StockQwen2.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits)
    for baseline in (stock_from_pretrained(tmp_path), stock_from_state_dict(stock.config, stock.state_dict())):
        assert same(baseline.state_dict(), stock.state_dict())
    copied = Qwen2ForCausalLM.from_state_dict(stock.config, stock.state_dict())
    assert same(of_ours(copied), of_ours(ours))
    assert stock.config.tie_word_embeddings, "the caller's configuration is as it was"
    ours.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    assert same(StockQwen2.from_pretrained(tmp_path / "saved").state_dict(), stock.state_dict())


@pytest.mark.skipif(not IS_V4, reason="5.x takes both tensors")
@pytest.mark.parametrize("make", [Qwen2ForCausalLM.from_state_dict, stock_from_state_dict])
def test_a_head_that_config_json_calls_tied_has_no_meaning_in_v4(make):
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from .*set tie_word_embeddings to false"):
        make(config(True), ORIGINAL)


def test_baselines_are_never_filled_with_random_values(tmp_path):
    """transformers only warns where tensors are missing."""
    Folder(head="absent").write(tmp_path)
    assert of_stock(tmp_path, {}) is None
    with pytest.raises(CheckpointError, match=r"1 tensors missing, first lm_head\.weight"):
        stock_from_pretrained(tmp_path)


# ---- the file that config.json names --------------------------------------------------------------------------------
def test_weights_that_the_configuration_names(tmp_path):
    """5.x reads them in place of the usual ones; 4.37.0 does not know the field."""
    Folder().write(tmp_path)
    OTHERS["model.fp16.safetensors"](tmp_path / "model.fp16.safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "model.fp16.safetensors"}))
    stock = of_stock(tmp_path, {})
    assert stock is not None
    assert same(stock, ORIGINAL if IS_V4 else stale())
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert same(of_ours(model), stock)
    model.save_pretrained(tmp_path)
    assert "transformers_weights" not in json.loads(path.read_text())
    saved = of_stock(tmp_path, {})
    assert saved is not None
    assert same(saved, stock)


@pytest.mark.skipif(IS_V4, reason="transformers 4.37.0 does not know the field")
@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("pytorch_model.bin", r"must be a \*\.safetensors file or an index of some; correct it"),
        ("../model.safetensors", r"is not inside .*: name a file of that folder"),
        ("x.safetensors", r"x\.safetensors does not exist; name a file of that folder"),
        ([1], r"must be a \*\.safetensors file"),
    ],
)
def test_weights_that_the_configuration_names_wrongly(tmp_path, named, message):
    Folder().write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": named}))
    with pytest.raises(CheckpointError, match=rf"transformers_weights=.* in config\.json.*{message}"):
        Qwen2ForCausalLM.from_pretrained(tmp_path)


def test_an_adapter_that_transformers_would_apply(tmp_path, monkeypatch):
    """Without peft it does not, and reads the weights as they are."""
    Folder().write(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    for module in ("shards", "adapter"):
        monkeypatch.setattr(f"qwen2_npu.checkpoint.{module}.is_peft_available", lambda: True)
    for load in (Qwen2ForCausalLM.from_pretrained, open_checkpoint):
        with pytest.raises(
            CheckpointError, match=r"has adapter_config\.json: .*merge_and_unload\(\), or remove the file"
        ):
            load(tmp_path)
    assert same(of_ours(Qwen2ForCausalLM.from_pretrained(tmp_path, adapter=False)), ORIGINAL)
    for module in ("shards", "adapter"):
        monkeypatch.setattr(f"qwen2_npu.checkpoint.{module}.is_peft_available", lambda: False)
    assert same(of_ours(Qwen2ForCausalLM.from_pretrained(tmp_path)), ORIGINAL)
