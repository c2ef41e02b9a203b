"""What a folder that a command writes consists of: weights, the files beside them, and what is left where it is."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu.checkpoint import folder_plan
from qwen2_npu.checkpoint.byte_ranges import Range, Stored, read_header
from qwen2_npu.checkpoint.folder_plan import FolderPlan, opened, plain, plan_of, read_text, separate, unmerged
from qwen2_npu.checkpoint.merging import run
from qwen2_npu.compat import IS_V4
from qwen2_npu.errors import CheckpointError
from tests.unit.checkpoint.merges import config_of, digest, guide_merged, weights_of, write_folder
from tests.unit.checkpoint.test_folders import NAME, as_root, message_to_nobody

CONFIG = config_of(4, 2, layers=1)
WEIGHTS = weights_of(CONFIG)
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of two files of weights."""
    return write_folder(tmp_path / "ordinary", CONFIG, WEIGHTS, shards=2)


def in_two(tensor: Stored) -> tuple[str, tuple[int, ...], list[Range]]:
    rows = tensor.shape[0]
    return tensor.dtype, tensor.shape, [tensor.rows(0, 1), tensor.rows(1, rows)]


def plan_like(folder: Path, output: Path, *without: str, **options: Any) -> FolderPlan:
    """A folder with the same tensors, but for those of some files."""
    headers = {path.name: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    new = {
        file: {} if file in without else {name: in_two(each) for name, each in tensors.items()}
        for file, (_, tensors) in headers.items()
    }
    return plan_of(folder, output, {}, headers, new, config_text=read_text(folder / "config.json"), **options)


def index_of(plan: FolderPlan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(file for file in plan.last if file.name == INDEX).head)
    return found


# ---- what is written -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shards", [None, 2])
def test_the_same_tensors_make_the_same_folder(shards: int | None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "ordinary", CONFIG, WEIGHTS, shards)
    (folder / "assets").mkdir()
    (folder / "assets" / "empty").touch()
    (folder / "assets" / "config.json").write_text("of something else")  # the name alone does not make it the config
    plan = plan_like(folder, tmp_path / "output")
    run(plan)
    assert digest(tmp_path / "output") == digest(folder)
    assert plan.size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert plan.left_out == ()


def test_what_makes_it_a_checkpoint_comes_last(folder: Path, tmp_path: Path) -> None:
    plan = plan_like(folder, tmp_path / "output")
    names = [file.name for file in plan.files]
    assert names == [*SHARDS, "LICENSE", "tokenizer_config.json", INDEX, "config.json"]


@pytest.mark.parametrize("name", ["a.safetensors", "z.safetensors"])
def test_a_file_of_another_name_has_an_index(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "ordinary", CONFIG, WEIGHTS)
    (folder / "model.safetensors").rename(folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, name)}))
    plan = plan_like(folder, tmp_path / "output")
    assert index_of(plan) == {"weight_map": dict.fromkeys(WEIGHTS, name)}
    assert INDEX in plan.inputs


def test_files_without_tensors_are_not_written(folder: Path, tmp_path: Path) -> None:
    plan = plan_like(folder, tmp_path / "output", SHARDS[0])
    assert [file.name for file in plan.shards] == SHARDS[1:]
    assert set(index_of(plan)["weight_map"].values()) == {SHARDS[1]}


def test_a_new_file_has_the_metadata_of_the_others(folder: Path, tmp_path: Path) -> None:
    headers = {file: read_header(folder / file) for file in SHARDS}
    tensor = next(iter(headers[SHARDS[0]][1].values()))
    new = {"new.safetensors": {"a": (tensor.dtype, tensor.shape, [tensor.bytes])}}
    plan = plan_of(folder, tmp_path / "output", {}, headers, new, config_text="{}")
    assert b'"__metadata__":{"format":"pt"}' in plan.shards[0].head


def test_a_file_keeps_its_own_metadata(folder: Path, tmp_path: Path) -> None:
    save_file(load_file(folder / SHARDS[1]), folder / SHARDS[1], metadata={"format": "pt", "more": "1"})
    plan = plan_like(folder, tmp_path / "output")
    assert [b'"more":"1"' in file.head for file in plan.shards] == [file == SHARDS[1] for file in SHARDS]


SIZE = sum(tensor.nbytes for tensor in WEIGHTS.values())
FIRST = sum(tensor.nbytes for tensor in list(WEIGHTS.values())[: len(WEIGHTS) // 2])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"total_size": SIZE}, {"total_size": SIZE - FIRST}),
        ({"total_size": float(SIZE)}, {"total_size": float(SIZE - FIRST)}),
        ({"total_size": SIZE + 7, "more": 1}, {"total_size": SIZE + 7 - FIRST, "more": 1}),  # of tensors counted twice
        ({"total_size": "large"}, {"total_size": "large"}),
        ({"total_size": None}, {"total_size": None}),
        ({}, {}),
        (None, None),
        ([1], [1]),
    ],
)
def test_the_size_in_the_index_changes_as_the_tensors_do(before: Any, after: Any, folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / INDEX).read_text()) | {"metadata": before, "more": "ä"}
    (folder / INDEX).write_text(json.dumps(values))
    plan = plan_like(folder, tmp_path / "output", SHARDS[0])
    assert index_of(plan)["metadata"] == after
    assert '"more": "ä"'.encode() in next(file for file in plan.last if file.name == INDEX).head


def test_the_output_may_be_below_the_home_folder(folder: Path) -> None:
    assert plan_like(folder, Path("~/output")).output == Path.home() / "output"


@pytest.mark.parametrize(
    ("mark", "part"), [(".merging-qkv.json", ".merging-qkv.part"), (".quantizing.json", ".quantizing.part")]
)
def test_the_unfinished_file_is_named_after_the_mark(mark: str, part: str, folder: Path, tmp_path: Path) -> None:
    assert plan_like(folder, tmp_path / "output", mark=mark).part == part


# ---- what it is made of ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shards", [None, 2])
def test_every_file_that_is_read_is_looked_at_again(shards: int | None, tmp_path: Path) -> None:
    """By its size and by its time."""
    folder = write_folder(tmp_path / "ordinary", CONFIG, WEIGHTS, shards)
    (folder / "assets").mkdir()
    (folder / "assets" / "a").touch()
    plan = plan_like(folder, tmp_path / "output")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(plan.inputs) == names
    plan.check_inputs()
    for name in names:
        path, stat = folder / name, (folder / name).stat()
        message = rf"^{re.escape(str(path))} was changed meanwhile: remove {tmp_path / 'output'} and run"
        for time in (stat.st_mtime_ns + 1, stat.st_mtime_ns - 1):
            os.utime(path, ns=(stat.st_atime_ns, time))
            with pytest.raises(CheckpointError, match=message):
                plan.check_inputs()
        os.truncate(path, stat.st_size + 1)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(CheckpointError, match=message):
            plan.check_inputs()
        os.truncate(path, stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        plan.check_inputs()


def test_a_file_that_was_removed_meanwhile(folder: Path, tmp_path: Path) -> None:
    plan = plan_like(folder, tmp_path / "output")
    (folder / "LICENSE").unlink()
    with pytest.raises(CheckpointError, match=r"LICENSE cannot be read: No such file"):
        plan.check_inputs()


def test_every_pair_of_copies_is_compared(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"ababac")
    same, other = (Range(path, 0, 2), Range(path, 2, 4)), (Range(path, 0, 2), Range(path, 4, 6))
    plan = plan_like(folder, tmp_path / "output")
    replace(plan, replicas=(("x", *same), ("y", *same))).check_replicas()
    with pytest.raises(CheckpointError, match=r": y holds a kv head several times, and the copies differ"):
        replace(plan, replicas=(("x", *same), ("y", *other))).check_replicas()


# ---- files beside the weights ----------------------------------------------------------------------------------------
LEFT_OUT = (
    "old.safetensors", "other.safetensors.index.json", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.gguf", "consolidated.pt", "x.pth",
    "assets/model.safetensors", ".cache/", ".git/", "assets/.cache/", "linked/", "pipe",
)  # fmt: skip
COPIED = (
    ".gitattributes", "training_args.bin", "x.pt.txt", "my_pytorch_model.bin", "data.h5", "data.msgpack",
    "safetensors", "assets/config.json", "assets/x.txt", "link.txt",
)  # fmt: skip
RUNS = (".merging-qkv.json", ".merging-qkv.part", ".quantizing.json", ".quantizing.part")


def test_files_that_are_copied_and_files_that_are_left_where_they_are(folder: Path, tmp_path: Path) -> None:
    """Of runs that were interrupted nothing is said."""
    there = {file.name for file in plan_like(folder, tmp_path / "output").others}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "text").write_text("far")
    for name in (*LEFT_OUT, *COPIED, *RUNS):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name == "linked/":
            path.symlink_to(tmp_path / "elsewhere")
        elif name == "link.txt":
            path.symlink_to(tmp_path / "elsewhere" / "text")
        elif name == "pipe":
            os.mkfifo(path)
        elif name.endswith("/"):
            path.mkdir()
            (path / "inside").touch()
        else:
            path.write_text(name)
    headers = {file: read_header(folder / file) for file in SHARDS}
    plan = plan_of(folder, tmp_path / "output", {}, headers, {}, config_text="{}")
    assert sorted(plan.left_out) == sorted(LEFT_OUT)
    assert {file.name for file in plan.others} - there == set(COPIED)
    copied = {file.name: b"".join(file.content()).decode() for file in plan.others}
    assert all(copied[name] == ("far" if name == "link.txt" else name) for name in COPIED)


def test_a_link_to_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "x.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors is a link to a file that is missing; fetch it again, or"
    ):
        folder_plan._others(folder, set())


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user can reach, with a file in a folder of it."""
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above, "model")
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "file").touch()
        Path(above).chmod(0o755)
        yield folder


@as_root
@pytest.mark.parametrize("name", ["sub", "sub/file"])
def test_what_another_user_may_not_read(name: str, readable: Path) -> None:
    assert message_to_nobody(lambda: folder_plan._others(readable, set())) == "no error"
    path = readable / name
    path.chmod(0o600 if path.is_file() else 0o711)
    message = message_to_nobody(lambda: folder_plan._others(readable, set()))
    assert message.startswith(f"{path} cannot be read: {NAME} has no permission for {path}")


# ---- what is read ----------------------------------------------------------------------------------------------------
def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes('{"ä":\r\n1}\n'.encode())
    assert read_text(tmp_path / "a") == '{"ä":\r\n1}\n'
    for path in (tmp_path / "b", tmp_path):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} cannot be read: "):
            read_text(path)


@pytest.mark.parametrize("output", ["model", "model/", "model/x", "model/x/y", "other/../model", "link", "link/x"])
def test_an_output_in_the_input(output: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    where = rf"inside {tmp_path / 'model'}, which is read" if "x" in output else "the folder that is read"
    with pytest.raises(CheckpointError, match=rf"^output path '{tmp_path}/{output}' is {where}: name a folder outside"):
        separate(tmp_path / "model", f"{tmp_path}/{output}")


@pytest.mark.parametrize("output", ["model-merged", "mode", "other", "other/model"])
def test_an_output_beside_the_input(output: str, tmp_path: Path) -> None:
    assert separate(str(tmp_path / "model"), tmp_path / output) == tmp_path / "model"
    assert separate("~/model", tmp_path / output) == Path.home() / "model"


@pytest.mark.parametrize(
    "name", ["sub/x.safetensors", "../x.safetensors", ".x.safetensors", "x.bin", "x.safetensors.bin", ".safetensors"]
)
def test_names_that_are_no_files_of_the_folder(name: str, tmp_path: Path) -> None:
    usual = ["model.safetensors", "model-00001-of-00002.safetensors", "2.x.safetensors", "-x.safetensors"]
    assert plain(tmp_path, usual) == usual
    with pytest.raises(
        CheckpointError, match=rf"names {re.escape(repr(name))}, and files of the folder itself are read"
    ):
        plain(tmp_path, [*usual, name])


def test_tensors_that_have_other_names(tmp_path: Path) -> None:
    config = config_of(4, 2, layers=1)
    base = {name.removeprefix("model."): tensor for name, tensor in weights_of(config).items() if "lm_head" not in name}
    folder = write_folder(tmp_path / "base", config, base)
    with pytest.raises(
        CheckpointError, match=r": embed_tokens\.weight is what the model has as|: layers\.0\.\S+ is what"
    ):
        opened(folder, config, ["model.safetensors"])


def test_a_head_that_is_the_embedding_is_no_other_name(tmp_path: Path) -> None:
    config = config_of(4, 2, layers=1)
    config.tie_word_embeddings = True
    weights = dict(WEIGHTS)
    weights.pop("model.embed_tokens.weight")
    folder = write_folder(tmp_path / "tied", config, weights)
    assert "model.embed_tokens.weight" in opened(folder, config, ["model.safetensors"]).shapes()


@pytest.mark.skipif(IS_V4, reason="transformers 4.37.0 reads no such field")
def test_weights_that_the_configuration_names(folder: Path) -> None:
    config = config_of(4, 2, layers=1, transformers_weights=SHARDS[0])
    with pytest.raises(CheckpointError, match=rf"config\.json says that its weights are \S+='{SHARDS[0]}': write the"):
        opened(folder, config, SHARDS)


def test_an_ordinary_checkpoint(folder: Path, tmp_path: Path) -> None:
    def refusal(folder: Path, name: str) -> CheckpointError:
        return CheckpointError(f"{folder}: no {name}")

    stored, headers = unmerged(folder, CONFIG, refusal)
    assert stored.shapes() == {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
    assert headers == {file: read_header(folder / file) for file in SHARDS}
    guide = write_folder(tmp_path / "guide", CONFIG, guide_merged(CONFIG, WEIGHTS, 2))
    with pytest.raises(CheckpointError, match=rf"^{guide}: no model\.layers\.0\.self_attn\.qkv\.(weight|bias)$"):
        unmerged(guide, CONFIG, refusal)
    save_file({"model.norm.weight": torch.ones(9)}, guide / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        unmerged(guide, CONFIG, refusal)


def test_a_field_before_the_others() -> None:
    assert folder_plan.with_first("\n 1,", ' {"a": {"b": 2}}') == ' {\n 1,"a": {"b": 2}}'
