"""Checkpoints that cannot be compared: named before the stock model meets them in its own way."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import pair, stock
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.pair import PERPLEXITY_WINDOW
from qwen2_npu.conformance.accuracy.streamed_pair import pair_of_checkpoint
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.optimizations import Optimizations
from tests.accuracy import quantised
from tests.unit.checkpoint.merges import config_of, guide_merged, weights_of, write_folder
from tests.unit.small import small_stock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path(), tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, name: str, rows: int) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:rows].clone()}, path, metadata={"format": "pt"})


def misshape(folder: Path) -> None:
    edit_weights(folder, "model.layers.0.self_attn.q_proj.weight", 1)


def misshape_vocabulary(folder: Path) -> None:
    edit_weights(folder, "model.embed_tokens.weight", 1000)


def shrink_vocabulary(folder: Path) -> None:
    misshape_vocabulary(folder)
    edit_config(folder, vocab_size=1000, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def shrink_positions(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=64)


def spoil_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (misshape, r"1 tensors mis-shaped, first model\.layers\.0\.self_attn\.q_proj\.weight has shape \(1, "),
        (misshape_vocabulary, r"first model\.embed_tokens\.weight has shape \(1000, \d+\), expected \(\d+, "),
        (
            shrink_vocabulary,
            r"its tokenizer makes token id \d+, and the model has vocab_size=1000: fetch",
        ),
        (
            shrink_positions,
            rf"max_position_embeddings=64, and the texts it is compared on need {PERPLEXITY_WINDOW}: raise it",
        ),
        (spoil_tokenizer, r"its tokenizer cannot be read: .*; fetch its files again"),
        (spoil_generation_config, r"generation_config\.json holds a list in place of a JSON object"),
    ],
)
def test_named_before_the_stock_model_is_loaded(
    folder: Path, spoil, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("the stock model was loaded first")

    monkeypatch.setattr(stock, "stock_from_pretrained", loaded)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelPair.of_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_ranks_that_cannot_share_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "rank_count", lambda: 7)
    with pytest.raises(UnsupportedError, match=r"^tp_size=7: .* query heads .*; this model can be cut for 1, 2"):
        pair.weights_of_checkpoint(None, dtype="auto", device="cpu", decode_steps=1)


def test_a_few_positions_suffice_without_a_tokenizer(tmp_path: Path) -> None:
    small_stock().save_pretrained(tmp_path, safe_serialization=True)
    edit_config(tmp_path, max_position_embeddings=32)
    ModelPair.of_checkpoint(tmp_path)
    edit_config(tmp_path, max_position_embeddings=28)
    with pytest.raises(CheckpointError, match="max_position_embeddings=28, and the texts it is compared on need 29"):
        ModelPair.of_checkpoint(tmp_path)


def test_padding_is_a_token_that_the_model_knows() -> None:
    found = ModelPair.of_checkpoint()
    assert found.pad_token_id == found.tokenizer.pad_token_id
    found.tokenizer.pad_token_id = None
    found.baseline.generation_config.eos_token_id = 10**6
    assert found.pad_token_id == 0
    assert torch.tensor(found.heldout_ids()).max() < found.baseline.config.vocab_size


# ---- as it was asked for ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind", [ModelPair.of_checkpoint, *(partial(pair_of_checkpoint, stream=s) for s in (True, False))]
)
def test_both_sides_read_a_merged_folder_for_the_ranks_that_are_given(kind: Any, tmp_path: Path) -> None:
    config = config_of(4, 2)
    folder = write_folder(tmp_path / "guide", config, guide_merged(config, weights_of(config), 2))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    found = kind(folder, assume_tp=2, decode_steps=1)
    assert found.eos_token_ids == [7, 5]
    assert found.compare(found.build(Optimizations.none()), "one")[0].passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_are_rounded_to_what_the_models_compute_in(dtype: torch.dtype) -> None:
    """Not to what they are stored in, which is bfloat16."""
    found: Any = pair.weights_of_checkpoint(quantised.folder("w8a16"), dtype=dtype, device="cpu", decode_steps=1)
    assert (found.dtype, found.source.dtype) == (dtype, dtype)
