"""Indexes of weights that are broken, or made to have other files read than those of the checkpoint."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import merging, sources
from qwen2_npu.checkpoint import shards as shards_module
from qwen2_npu.checkpoint.shards import INDEX_FILE, SINGLE_FILE, weights_files
from qwen2_npu.compat import WEIGHTS_FIELD
from qwen2_npu.conformance.accuracy.stock import stock_from_pretrained
from qwen2_npu.errors import CheckpointError
from tests.unit.small import V4, small_config, small_stock, stock_weights

CONFIG = small_config(num_hidden_layers=1, hidden_size=64, intermediate_size=32, vocab_size=61)
WEIGHTS = stock_weights(small_stock(CONFIG))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stock checkpoint of several shards, in a folder of its own."""
    path = tmp_path / "stock"
    small_stock(CONFIG).save_pretrained(path, max_shard_size="40KB", safe_serialization=True)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"] = change(index["weight_map"]) or index["weight_map"]
    (folder / INDEX_FILE).write_text(json.dumps(index))


def rename(folder: Path, old: str, new: str) -> None:
    """Have the index name a file otherwise."""
    edit_index(folder, lambda names: {name: new if file == old else file for name, file in names.items()})


class Bomb:
    """What no file may have the power to do: run code while it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


# ---- indexes that have other files read -----------------------------------------------------------------------------
def outside(folder: Path) -> str:
    shard = first_shard(folder)
    shard.rename(folder.parent / shard.name)
    rename(folder, shard.name, f"../{shard.name}")
    return rf"names '\.\./{shard.name}', which is not inside the folder: .*fetch the index again"


def outside_and_back(folder: Path) -> str:
    shard = first_shard(folder)
    rename(folder, shard.name, f"../{folder.name}/{shard.name}")
    return "which is not inside the folder"


def absolute(folder: Path) -> str:
    shard = first_shard(folder)
    rename(folder, shard.name, str(shard))
    return "which is not inside the folder"


def pickled(folder: Path) -> str:
    shard = first_shard(folder)
    torch.save(load_file(shard), folder / "shard.bin")
    rename(folder, shard.name, "shard.bin")
    return r"names 'shard\.bin', and by its own name it is an index of \*\.safetensors files: no other file is read"


def all_pickled(folder: Path) -> str:
    (folder / "all.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    edit_index(folder, lambda names: dict.fromkeys(names, "all.bin"))
    return r"names 'all\.bin', and by its own name it is an index of \*\.safetensors files"


def config_file(folder: Path) -> str:
    rename(folder, first_shard(folder).name, "config.json")
    return r"names 'config\.json', and by its own name"


# ---- indexes that are none ------------------------------------------------------------------------------------------
def no_map(folder: Path) -> str:
    (folder / INDEX_FILE).write_text('{"metadata": {}}')
    return "is not a valid index: weight_map=None must map tensors to files"


def a_list(folder: Path) -> str:
    (folder / INDEX_FILE).write_text('{"weight_map": ["model-00001-of-00003.safetensors"]}')
    return "is not a valid index: weight_map="


def a_number(folder: Path) -> str:
    edit_index(folder, lambda names: names | {"lm_head.weight": 3})
    return "is not a valid index: weight_map="


def no_name(folder: Path) -> str:
    edit_index(folder, lambda names: names | {"lm_head.weight": ""})
    return "is not a valid index: weight_map="


def a_name_of_no_file(folder: Path) -> str:
    rename(folder, first_shard(folder).name, "a\0b.safetensors")
    return "shards named by .* are missing, first a"


def twice(folder: Path) -> str:
    path = folder / INDEX_FILE
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x.safetensors", '))
    return r"is not a valid index: 'lm_head\.weight' is in it twice; fetch it again"


def two_maps(folder: Path) -> str:
    path = folder / INDEX_FILE
    path.write_text('{"weight_map": {"a": "b.safetensors"}, ' + path.read_text().lstrip("{ \n"))
    return "is not a valid index: 'weight_map' is in it twice"


# ---- files that are none --------------------------------------------------------------------------------------------
def missing(folder: Path) -> str:
    first_shard(folder).unlink()
    return r"1 of \d+ shards named by .* are missing, first model-00001-.*; fetch the rest"


def a_folder(folder: Path) -> str:
    shard = first_shard(folder)
    shard.unlink()
    shard.mkdir()
    return r"are missing, first model-00001-.* \(a folder\); fetch"


def dangling(folder: Path) -> str:
    shard = first_shard(folder)
    shard.unlink()
    shard.symlink_to("../../blobs/nowhere")
    return "are missing, first model-00001-"


def truncated(folder: Path) -> str:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1])
    return r"model-00001-of-\d+\.safetensors \(\d+ bytes\) is truncated or damaged .*; fetch this file again"


def empty(folder: Path) -> str:
    first_shard(folder).write_bytes(b"")
    return r"model-00001-of-\d+\.safetensors \(0 bytes\) is truncated"


def map_with(folder: Path, name: Any) -> str:
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    index["weight_map"] |= {"last": name}
    path.write_text(json.dumps(index))
    return "is not a valid index: weight_map=.* must map tensors to files; fetch it again"


def an_empty_name_at_last(folder: Path) -> str:
    return map_with(folder, "")


def a_number_at_last(folder: Path) -> str:
    return map_with(folder, 1)


BREAKAGES = [
    an_empty_name_at_last, a_number_at_last,
    outside, outside_and_back, absolute, pickled, all_pickled, config_file,
    no_map, a_list, a_number, no_name, a_name_of_no_file, twice, two_maps,
    missing, a_folder, dangling, truncated, empty,
]  # fmt: skip


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__)
def test_one_error_that_names_the_file_before_anything_is_read(folder, breakage, monkeypatch):
    """From every reader of a folder."""

    def read(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were read")

    message = breakage(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch, "load", read)
    monkeypatch.setattr(sources.SafetensorsSource, "pieces", read)
    readers: list[Callable[[], Any]] = [
        lambda: Qwen2ForCausalLM.from_pretrained(folder),
        lambda: Qwen2ForCausalLM.from_pretrained(folder, weights_file=INDEX_FILE),
        lambda: stock_from_pretrained(folder),
        lambda: merging.merge_qkv(folder, folder.parent / "merged"),
    ]
    for reader in readers:
        with pytest.raises(CheckpointError, match=message) as caught:
            reader()
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (folder / "exploded").exists()


# ---- what goes on working -------------------------------------------------------------------------------------------
def same(model: Qwen2ForCausalLM) -> bool:
    return all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in model.stock_state_dict().items())


def test_snapshots_of_the_hugging_face_cache(folder, tmp_path):
    """All of their files are links that lead outside of the folder."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert same(Qwen2ForCausalLM.from_pretrained(snapshot))


def test_files_in_folders_of_the_folder(folder):
    """Named by an index beside them, or above them; transformers reads them, too."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    (folder / "parts").mkdir()
    for shard in shards:
        (folder / shard).rename(folder / "parts" / shard)
    (folder / "parts" / INDEX_FILE).write_text((folder / INDEX_FILE).read_text())
    edit_index(folder, lambda names: {name: f"parts/{file}" for name, file in names.items()})
    for weights_file in (None, INDEX_FILE, f"parts/{INDEX_FILE}"):
        assert weights_files(folder, weights_file) == [f"parts/{shard}" for shard in shards]
        assert same(Qwen2ForCausalLM.from_pretrained(folder, weights_file=weights_file))
    read_by_stock = stock_from_pretrained(folder).state_dict()
    assert all(torch.equal(read_by_stock[name], tensor) for name, tensor in WEIGHTS.items())


# ---- weights by name ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["../other.safetensors", "..", "{}/other.safetensors", "{}/stock/x.safetensors"])
def test_a_weights_file_is_one_of_the_folder(folder, where):
    save_file(WEIGHTS, folder.parent / "other.safetensors")
    name = where.format(folder.parent)
    with pytest.raises(CheckpointError, match=r"weights_file='.*' is not inside .*stock: name a file of that folder"):
        Qwen2ForCausalLM.from_pretrained(folder, weights_file=name)


@pytest.mark.parametrize(
    ("index", "file", "message"),
    [
        ("pytorch_model.bin.index.json", "a.safetensors", r"is an index of \*\.bin files"),
        ("pytorch_model.bin.index.json", "a.pth", r"is an index of \*\.bin files"),
        ("pytorch_model.bin.index.fp16.json", "../a.bin", "which is not inside the folder"),
        ("weights.index.json", "a.bin", r"is an index of \*\.safetensors files"),
        ("weights.json", "a.bin", r"is an index of \*\.safetensors files"),
        ("model.safetensors.index.fp16.json", "a.bin", r"is an index of \*\.safetensors files"),
    ],
)
def test_an_index_has_files_of_its_own_kind_read(folder, index, file, message):
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, file)}))
    torch.save(WEIGHTS, folder.parent / "a.bin")
    torch.save(WEIGHTS, folder / Path(file).name)
    with pytest.raises(CheckpointError, match=message):
        Qwen2ForCausalLM.from_pretrained(folder, weights_file=index)


@pytest.mark.parametrize(
    ("index", "file"),
    [
        ("model.safetensors.index.fp16.json", "all.safetensors"),
        ("weights.index.json", "all.safetensors"),
        ("2.instruct.index.json", "all.safetensors"),
        ("pytorch_model.bin.index.json", "all.bin"),
        ("pytorch_model.bin.index.fp16.json", "all.bin"),
    ],
)
def test_an_index_of_any_name(folder, index, file):
    other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    (torch.save if file.endswith(".bin") else save_file)(other, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, file)}))
    model = Qwen2ForCausalLM.from_pretrained(folder, weights_file=index)
    assert torch.equal(model.model.norm.weight, WEIGHTS["model.norm.weight"] + 1)


# ---- which of several ----------------------------------------------------------------------------------------------
def test_one_file_goes_before_an_index_and_what_the_caller_names_before_both(folder):
    """As in transformers; what config.json names (5.x) is in between."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert weights_files(folder) == shards
    for name in (SINGLE_FILE, "named.safetensors"):
        save_file(WEIGHTS, folder / name)
    assert weights_files(folder) == [SINGLE_FILE]
    config = small_config(**{WEIGHTS_FIELD: "named.safetensors"})
    assert weights_files(folder, config=config) == ([SINGLE_FILE] if V4 else ["named.safetensors"])
    assert weights_files(folder, INDEX_FILE, config=config) == shards


def test_an_adapter_beside_the_weights_is_the_caller_s_to_decide(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "is_peft_available", lambda: True)
    shards = weights_files(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert weights_files(folder, beside_adapter=True) == weights_files(folder, INDEX_FILE) == shards
    with pytest.raises(CheckpointError, match="transformers applies that adapter to the weights"):
        weights_files(folder)


# ---- pickles --------------------------------------------------------------------------------------------------------
def test_a_tensor_in_two_pickles(folder):
    names = list(WEIGHTS)
    for file, part in {"a.bin": names[:-3], "b.bin": names[-4:]}.items():
        torch.save({name: WEIGHTS[name] for name in part}, folder / file)
    weight_map = dict.fromkeys(names, "a.bin") | dict.fromkeys(names[-3:], "b.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"tensor {names[-4]} is in a\.bin and in b\.bin, which are not of one"):
        Qwen2ForCausalLM.from_pretrained(folder, weights_file="pytorch_model.bin.index.json")


def test_a_pickle_of_an_old_torch(folder):
    """Before torch 1.6 these were no archives. transformers reads them."""
    torch.save(WEIGHTS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(Qwen2ForCausalLM.from_pretrained(folder, weights_file="pytorch_model.bin"))


def test_a_pickle_with_other_names_than_texts(folder):
    torch.save({0: torch.ones(2), "w": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin has 0 in place of the name of a tensor"):
        Qwen2ForCausalLM.from_pretrained(folder, weights_file="pytorch_model.bin")


def test_a_pickle_that_would_run_code(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read as a torch state dict"):
        Qwen2ForCausalLM.from_pretrained(folder, weights_file="pytorch_model.bin")
    assert not (folder / "exploded").exists()
