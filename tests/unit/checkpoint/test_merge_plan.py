"""What a merged folder consists of, and what cannot be merged or unmerged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu.checkpoint.folders import MERGING
from qwen2_npu.checkpoint.merge_plan import plan_merge, plan_unmerge, with_record, without_record
from qwen2_npu.checkpoint.merged import PARTS, Layout
from qwen2_npu.checkpoint.merging import merge_qkv, run, unmerge_qkv
from qwen2_npu.checkpoint.sources import open_checkpoint
from qwen2_npu.compat import IS_V4
from qwen2_npu.conformance import tiny
from qwen2_npu.errors import CheckpointError, UnsupportedError
from tests.unit.checkpoint.merges import (
    config_of,
    digest,
    guide_merged,
    same_bits,
    tensors_of,
    weights_of,
    write_folder,
)

CONFIG = config_of(4, 2)
WEIGHTS = weights_of(CONFIG)
SHARD = "model-00002-of-00005.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of five files, whose borders lie between q, k and v of both layers."""
    return write_folder(tmp_path / "ordinary", CONFIG, WEIGHTS, shards=5)


# ---- there and back --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [(14, 2), (12, 2), (28, 4), (64, 8)])
@pytest.mark.parametrize("shards", [None, 3, 27])
def test_unmerging_restores_every_file_byte_for_byte(
    heads: tuple[int, int], shards: int | None, tmp_path: Path
) -> None:
    """Tensors, shards, index, config.json and what lies beside them: also with a file for every tensor."""
    config = config_of(*heads)
    folder = write_folder(tmp_path / "ordinary", config, weights_of(config), shards)
    for tp_size in (1, 2, 4)[: 2 if heads == (14, 2) else 3]:
        merged, back = tmp_path / f"merged-{tp_size}", tmp_path / f"back-{tp_size}"
        merge_qkv(folder, merged, tp_size=tp_size)
        assert digest(merged) != digest(folder)
        unmerge_qkv(merged, back)
        assert digest(back) == digest(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_every_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "ordinary", CONFIG, weights_of(CONFIG, dtype))
    merge_qkv(folder, tmp_path / "merged")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "merged").values()} == {dtype}
    unmerge_qkv(tmp_path / "merged", tmp_path / "back")
    assert digest(tmp_path / "back") == digest(folder)


def test_the_tiny_checkpoint(tmp_path: Path) -> None:
    merge_qkv(tiny.path(), tmp_path / "merged", tp_size=2)
    unmerge_qkv(tmp_path / "merged", tmp_path / "back")
    compiled = {name for name in digest(tiny.path()) if "__pycache__" in name}
    assert digest(tmp_path / "back").keys() | compiled == digest(tiny.path()).keys() | compiled
    assert digest(tmp_path / "back").items() <= digest(tiny.path()).items()


def test_the_guide_s_folder_becomes_ordinary(tmp_path: Path) -> None:
    guide = write_folder(tmp_path / "guide", CONFIG, guide_merged(CONFIG, WEIGHTS, 4))
    assert plan_unmerge(guide, tmp_path / "back", assume_tp=4).options == {"unmerge": 4}
    unmerge_qkv(guide, tmp_path / "back", assume_tp=4)
    found = tensors_of(tmp_path / "back")
    assert found.keys() == WEIGHTS.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in WEIGHTS.items())
    assert (tmp_path / "back" / "config.json").read_bytes() == (guide / "config.json").read_bytes()


def test_the_index_is_right_about_sizes_and_files(tmp_path: Path) -> None:
    config = config_of(12, 2)
    folder = write_folder(tmp_path / "ordinary", config, weights_of(config), shards=5)
    merge_qkv(folder, tmp_path / "merged", tp_size=4)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    tensors = tensors_of(tmp_path / "merged")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {
        name: path.name for path in (tmp_path / "merged").glob("*.safetensors") for name in load_file(path)
    }


def test_tied_heads_and_old_rotary_frequencies_are_copied(tmp_path: Path) -> None:
    config = config_of(4, 2)
    config.tie_word_embeddings = True
    weights = weights_of(config)
    embedding = weights["model.embed_tokens.weight"]
    extra = {"lm_head.weight": embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}
    folder = write_folder(tmp_path / "ordinary", config, weights | extra)
    merge_qkv(folder, tmp_path / "merged")
    assert tensors_of(tmp_path / "merged").keys() >= extra.keys()
    unmerge_qkv(tmp_path / "merged", tmp_path / "back")
    assert digest(tmp_path / "back") == digest(folder)


@pytest.mark.parametrize("kind", ["a head of its own", "a head alone"])
def test_tied_models_that_store_a_head(kind: str, tmp_path: Path) -> None:
    """They stay what they are, and each rank reads the head."""
    config = config_of(4, 2)
    weights = weights_of(config)
    config.tie_word_embeddings = True
    if kind == "a head alone":
        weights.pop("model.embed_tokens.weight")
    folder = write_folder(tmp_path / "ordinary", config, weights)
    if IS_V4 and kind == "a head of its own":
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            plan_merge(folder, tmp_path / "merged")
        return
    plan = plan_merge(folder, tmp_path / "merged", tp_size=2)
    assert sum(plan.read_by_rank) >= sum(tensor.nbytes for tensor in weights.values())
    run(plan)
    assert tensors_of(tmp_path / "merged").keys() >= {"lm_head.weight"}
    source = open_checkpoint(tmp_path / "merged")
    assert source.config.tie_word_embeddings is (kind == "a head alone")
    found = dict(source.tensors())
    assert same_bits(found.get("lm_head.weight", found["model.embed_tokens.weight"]), weights["lm_head.weight"])
    unmerge_qkv(tmp_path / "merged", tmp_path / "back")
    assert digest(tmp_path / "back") == digest(folder)


def test_names_of_a_base_model_are_not_merged(tmp_path: Path) -> None:
    """The folder is loaded, and its names would not be found in the one that is written."""
    config = config_of(4, 2)
    config.tie_word_embeddings = True
    weights = {name.removeprefix("model."): tensor for name, tensor in weights_of(config).items()}
    folder = write_folder(tmp_path / "base", config, weights)
    assert open_checkpoint(folder).shapes().keys() == {f"model.{name}" for name in weights}
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.\S+ is what the model has as model\.layers.*save_pretrained"
    ):
        plan_merge(folder, tmp_path / "merged")
    merged = {
        name.removeprefix("model."): tensor for name, tensor in guide_merged(config, weights_of(config), 2).items()
    }
    guide = write_folder(tmp_path / "guide", config, merged)
    found = dict(open_checkpoint(guide, assume_tp=2).tensors())
    assert all(same_bits(found[name], tensor) for name, tensor in weights_of(config).items())
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.\S+ is what the model has as model\.layers.*save_pretrained"
    ):
        plan_unmerge(guide, tmp_path / "ordinary", assume_tp=2)


@pytest.mark.skipif(IS_V4, reason="transformers 4.37.0 reads no such field")
def test_weights_that_the_configuration_names_are_not_merged(folder: Path, tmp_path: Path) -> None:
    save_file(WEIGHTS, folder / "model-best.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "model-best.safetensors"}))
    with pytest.raises(CheckpointError, match=r"transformers_weights='model-best\.safetensors': write the checkpoint"):
        plan_merge(folder, tmp_path / "merged")


def test_files_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    weights = {
        "flax_model.msgpack", "model-00009-of-00009.safetensors", "model.gguf", "pytorch_model.bin", "tf_model.h5",
        "x.pt", "x.pth",
    }  # fmt: skip
    for name in (*weights, ".gitattributes", "notes.bin"):
        (folder / name).write_text(name)
    for name in (".cache", "assets/inner"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file.txt").write_text(name)
    os.mkfifo(folder / "pipe")
    plan = plan_merge(folder, tmp_path / "merged")
    left_out = {".cache/", "pipe", *weights}
    assert set(plan.left_out) == left_out
    run(plan)
    assert (tmp_path / "merged" / "assets" / "inner" / "file.txt").read_text() == "assets/inner"
    assert {".gitattributes", "notes.bin", "LICENSE", "tokenizer_config.json"} <= set(os.listdir(tmp_path / "merged"))
    assert not left_out & {f"{name}/" for name in os.listdir(tmp_path / "merged")} | left_out & set(
        os.listdir(tmp_path / "merged")
    )


def test_links_of_hugging_face_s_cache(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    merge_qkv(snapshot, tmp_path / "merged", tp_size=2)
    assert not [path for path in (tmp_path / "merged").iterdir() if path.is_symlink()]
    unmerge_qkv(tmp_path / "merged", tmp_path / "back")
    assert digest(tmp_path / "back") == digest(snapshot)


def test_what_each_rank_reads(folder: Path, tmp_path: Path) -> None:
    plan = plan_merge(folder, tmp_path / "merged", tp_size=2)
    source = open_checkpoint(folder)
    from qwen2_npu.parallel.sharding import Shard

    for rank, size in enumerate(plan.read_by_rank):
        parts = source.tensors(lambda name, rank=rank: Shard(rank, 2).slice_of(name, CONFIG))
        assert size == sum(tensor.numel() * tensor.element_size() for _, tensor in parts)
        source = open_checkpoint(folder)
    assert len(plan.read_by_rank) == 2


# ---- the record ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ['{"a": 1}', '{\n  "a": 1\n}\n', '\n {"a":1}', '{\r\n\t"ä": 1\r\n}'])
def test_the_record_leaves_no_trace(text: str) -> None:
    recorded = with_record(text, Layout(2))
    assert json.loads(recorded) == json.loads(text) | {"qwen2_npu": {"layout": "fused_qkv", "tp_size": 2, "version": 1}}
    assert without_record(recorded) == text
    assert with_record(recorded, Layout(4)) == with_record(text, Layout(4)), "one record, not two"


def test_a_config_that_was_edited_since_keeps_the_edit(tmp_path: Path, folder: Path) -> None:
    merge_qkv(folder, tmp_path / "merged")
    path = tmp_path / "merged" / "config.json"
    values = json.loads(path.read_text()) | {"max_position_embeddings": 32}
    path.write_text(json.dumps(values, sort_keys=True))
    unmerge_qkv(tmp_path / "merged", tmp_path / "back")
    del values["qwen2_npu"]
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == values


# ---- refused ---------------------------------------------------------------------------------------------------------
def truncate(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-10])


def extra_tensor(folder: Path) -> None:
    save_file(load_file(folder / SHARD) | {"model.layers.7.mlp.up_proj.weight": torch.ones(2)}, folder / SHARD)


def missing_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def shards_elsewhere(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / SHARD).rename(folder / "sub" / SHARD)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(SHARD, f"sub/{SHARD}"))


def other_dtype(part: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        name = f"model.layers.1.self_attn.{part}"
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            save_file(tensors | ({name: tensors[name].float()} if name in tensors else {}), path)

    return spoil


def broken_link(folder: Path) -> None:
    (folder / "merges.txt").symlink_to(folder / "blob")


def quantised(folder: Path) -> None:
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(folder / SHARD).items()}, folder / SHARD)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, rf"{SHARD} \(\d+ bytes\) is truncated or damaged"),
        (missing_index, "has neither model.safetensors nor model.safetensors.index.json; fetch them again"),
        (extra_tensor, r"1 tensors unexpected, first model\.layers\.7\.mlp\.up_proj\.weight"),
        (lambda folder: (folder / SHARD).unlink(), f"1 of 5 shards named by .* are missing, first {SHARD}"),
        (shards_elsewhere, f"names 'sub/{SHARD}', and files of the folder itself are read"),
        *(
            (other_dtype(f"{part}.{kind}"), rf"layers\.1\.self_attn\.q_proj\.{kind} is stored as .*, and k or v of its")
            for part in PARTS
            for kind in ("weight", "bias")
        ),
        (broken_link, r"merges\.txt is a link to a file that is missing; fetch it again"),
        (quantised, "is stored as I8, which is quantised"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    ],
)
def test_an_input_that_does_not_serve(
    spoil: Callable[[Path], object], message: str, folder: Path, tmp_path: Path
) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        merge_qkv(folder, tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("tp_size", "fault"), [(3, "do not divide 4"), (8, "do not divide 4"), (16, "at most 8")])
def test_ranks_that_the_heads_cannot_be_cut_for(tp_size: int, fault: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"tp_size={tp_size}: .*{fault}.*can be cut for 1, 2, 4"):
        merge_qkv(folder, tmp_path / "merged", tp_size=tp_size)
    assert not (tmp_path / "merged").exists()


def test_what_is_merged_already(folder: Path, tmp_path: Path) -> None:
    merge_qkv(folder, tmp_path / "merged", tp_size=2)
    with pytest.raises(
        CheckpointError, match=r"is merged already \(.*; for tp_size=2\): load it as it is, or"
    ) as caught:
        merge_qkv(tmp_path / "merged", tmp_path / "again")
    assert f"`qwen2-npu merge-qkv --unmerge --model-path {tmp_path / 'merged'} --output-path" in str(caught.value)
    guide = write_folder(tmp_path / "guide", CONFIG, guide_merged(CONFIG, WEIGHTS, 2))
    with pytest.raises(CheckpointError, match=r"does not record for how many ranks.*`qwen2-npu .*--assume-tp N "):
        merge_qkv(guide, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_is_not_merged(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no merged q, k and v: it is an ordinary checkpoint"):
        unmerge_qkv(folder, tmp_path / "back")
    merge_qkv(folder, tmp_path / "merged", tp_size=2)
    with pytest.raises(UnsupportedError, match=r"tp_size=4: .* is merged for tp_size=2; leave it out when unmerging"):
        plan_unmerge(tmp_path / "merged", tmp_path / "back", tp_size=4)
    plan = plan_unmerge(tmp_path / "merged", tmp_path / "back", tp_size=2)
    assert plan.shards
    assert plan.options == {"unmerge": "recorded"}


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("from_end", [1, 3], ids=["v", "k"])  # of the last rank: each has two rows
def test_copies_of_a_head_that_differ(from_end: int, kind: str, tmp_path: Path) -> None:
    config = config_of(12, 2)
    folder = write_folder(tmp_path / "ordinary", config, weights_of(config))
    merge_qkv(folder, tmp_path / "merged", tp_size=4)
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.1.self_attn.qkv_proj.{kind}"][-from_end] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"layers\.1\.self_attn\.qkv_proj\.{kind} holds a kv head several times"):
        unmerge_qkv(tmp_path / "merged", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("output", "message"), [(".", "is the folder that is read"), ("sub/x", "is inside .*ordinary")]
)
def test_an_output_in_the_input(output: str, message: str, folder: Path, tmp_path: Path) -> None:
    before = digest(folder)
    (tmp_path / "link").symlink_to(folder)
    for above in (folder, tmp_path / "link"):
        with pytest.raises(CheckpointError, match=message):
            merge_qkv(folder, above / output)
    assert digest(folder) == before


def test_marks_of_a_run_are_not_copied(folder: Path, tmp_path: Path) -> None:
    (folder / MERGING).write_text("{}")
    merge_qkv(folder, tmp_path / "merged")
    assert not (tmp_path / "merged" / MERGING).exists()
