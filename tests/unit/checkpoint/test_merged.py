"""Merged folders, read: by one process or by every rank, with and without a record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint import sources
from qwen2_npu.checkpoint.merged import Layout, MergedSource
from qwen2_npu.checkpoint.merging import merge_qkv
from qwen2_npu.conformance.accuracy.stock import stock_from_pretrained, stock_from_state_dict
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.parallel.sharding import Shard, admissible_sizes
from tests.unit.checkpoint.merges import (
    HEADS,
    config_of,
    guide_merged,
    same_bits,
    tensors_of,
    weights_of,
    write_folder,
)

CONFIG = config_of(4, 2)
WEIGHTS = weights_of(CONFIG)


@pytest.fixture
def ordinary(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "ordinary", CONFIG, WEIGHTS)


@pytest.fixture
def merged(ordinary: Path, tmp_path: Path) -> Path:
    merge_qkv(ordinary, tmp_path / "merged", tp_size=2)
    return tmp_path / "merged"


@pytest.fixture
def by_guide(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "guide", CONFIG, guide_merged(CONFIG, WEIGHTS, 2))


def test_tensors_that_are_asked_for_by_name(merged: Path) -> None:
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "vqk"] + ["model.norm.weight"]
    source = sources.open_checkpoint(merged)
    for asked in ([], names[:1], names, list(WEIGHTS)):
        read = source.read(asked)
        assert list(read) == asked
        assert all(same_bits(read[name], WEIGHTS[name]) for name in asked)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ---- what is in the tensor ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", HEADS)
def test_the_rows_are_those_that_each_rank_holds(size: str, tmp_path: Path) -> None:
    config = config_of(*HEADS[size], layers=1)
    weights = weights_of(config)
    folder = write_folder(tmp_path / "ordinary", config, weights)
    sizes = admissible_sizes(config)
    # The two kv heads of 1.5B stand there two or three times.
    assert sizes == {"0.5B": (1, 2), "1.5B": (1, 2, 4, 6), "7B": (1, 2, 4), "72B": (1, 2, 4, 8)}[size]
    for tp_size in sizes:
        output = tmp_path / f"merged-{tp_size}"
        merge_qkv(folder, output, tp_size=tp_size)
        found = tensors_of(output)
        for kind in ("weight", "bias"):
            rows = []
            for rank in range(tp_size):
                for part in ("q_proj", "k_proj", "v_proj"):
                    name = f"model.layers.0.self_attn.{part}.{kind}"
                    cut = Shard(rank, tp_size).slice_of(name, config)
                    rows.append(weights[name] if cut is None else weights[name][cut.start : cut.stop])
            assert same_bits(found.pop(f"model.layers.0.self_attn.qkv_proj.{kind}"), torch.cat(rows))
        assert found.keys() == {name for name in weights if not re.search("[qkv]_proj", name)}
        assert all(same_bits(tensor, weights[name]) for name, tensor in found.items())
        record = json.loads((output / "config.json").read_text())["qwen2_npu"]
        assert record == {"layout": "fused_qkv", "tp_size": tp_size, "version": 1}


# ---- loading --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
@pytest.mark.parametrize("size", HEADS)
def test_every_rank_loads_what_it_loads_of_the_ordinary_folder(
    size: str, optimizations: Optimizations, tmp_path: Path
) -> None:
    config = config_of(*HEADS[size], layers=1)
    folder = write_folder(tmp_path / "ordinary", config, weights_of(config))
    merge_qkv(folder, tmp_path / "merged-1")
    for tp_size in admissible_sizes(config)[1:]:
        merge_qkv(folder, tmp_path / f"merged-{tp_size}", tp_size=tp_size)
        for rank in range(tp_size):
            ranks = {"tp_size": tp_size, "tp_rank": rank, "optimizations": optimizations}
            expected = Qwen2ForCausalLM.from_pretrained(folder, **ranks).state_dict()
            for merged in ("merged-1", f"merged-{tp_size}"):
                loaded = Qwen2ForCausalLM.from_pretrained(tmp_path / merged, **ranks).state_dict()
                assert loaded.keys() == expected.keys()
                assert all(same_bits(loaded[name], tensor) for name, tensor in expected.items())


def test_one_process_loads_any_merged_folder(merged: Path) -> None:
    model = Qwen2ForCausalLM.from_pretrained(merged)
    assert all(same_bits(tensor, WEIGHTS[name]) for name, tensor in model.stock_state_dict().items())


def test_what_is_saved_is_ordinary(merged: Path, tmp_path: Path) -> None:
    Qwen2ForCausalLM.from_pretrained(merged).save_pretrained(tmp_path / "saved")
    assert "qwen2_npu" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert tensors_of(tmp_path / "saved").keys() == WEIGHTS.keys()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_rank_reads_its_rows_and_nothing_else(
    tp_size: int, ordinary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_qkv(ordinary, tmp_path / "merged", tp_size=tp_size)
    read: dict[str, int] = {}
    original = sources.SafetensorsSource.pieces

    def watched(self: Any, cuts: Any) -> Any:
        for name, pieces in original(self, cuts):
            read[name] = sum(piece.shape[0] for piece in pieces)
            yield name, pieces

    monkeypatch.setattr(sources.SafetensorsSource, "pieces", watched)
    Qwen2ForCausalLM.from_pretrained(tmp_path / "merged", tp_size=2, tp_rank=1)
    assert read["model.layers.0.self_attn.qkv_proj.weight"] == (4 + 2 + 2) * 2 // 2


def test_loading_holds_the_tensors_of_one_layer(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[weakref.ref] = []
    original = MergedSource.tensors

    def watched(self: Any, cut: Any) -> Any:
        for name, tensor in original(self, cut):
            assert sum(ref() is not None for ref in alive) <= 1, f"{name}: an earlier tensor is still in memory"
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    monkeypatch.setattr(MergedSource, "tensors", watched)
    Qwen2ForCausalLM.from_pretrained(merged)
    assert len(alive) == len(WEIGHTS)


def test_another_number_of_ranks(tmp_path: Path) -> None:
    config = config_of(8, 8)
    folder = write_folder(tmp_path / "ordinary", config, weights_of(config))
    merged = tmp_path / "merged"
    merge_qkv(folder, merged, tp_size=4)
    with pytest.raises(CheckpointError, match="merged for tp_size=4, and 2 ranks load it: start 4, or") as caught:
        Qwen2ForCausalLM.from_pretrained(merged, tp_size=2, tp_rank=0)
    for command in (
        f"qwen2-npu merge-qkv --unmerge --model-path {merged} --output-path {merged}-unmerged",
        f"qwen2-npu merge-qkv --tp-size 2 --model-path {merged}-unmerged --output-path {merged}-tp2",
    ):
        assert f"`{command}`" in str(caught.value)
    guide = write_folder(tmp_path / "guide", config, guide_merged(config, weights_of(config), 4))
    with pytest.raises(CheckpointError, match="merged for tp_size=4, and 2 ranks load it") as caught:
        Qwen2ForCausalLM.from_pretrained(guide, tp_size=2, tp_rank=0, assume_tp=4)
    command = f"qwen2-npu merge-qkv --unmerge --assume-tp 4 --model-path {guide} --output-path {guide}-unmerged"
    assert f"`{command}`" in str(caught.value)


# ---- the guide's own script -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("heads", "tp_size"), [((4, 2), 1), ((4, 2), 2), ((12, 2), 4), ((28, 4), 4)])
def test_the_guide_s_folder_with_its_tp_size(heads: tuple[int, int], tp_size: int, tmp_path: Path) -> None:
    """Also where it tears a kv head apart: 2 heads for 4 ranks."""
    config = config_of(*heads)
    weights = weights_of(config)
    folder = write_folder(tmp_path / "guide", config, guide_merged(config, weights, tp_size))
    model = Qwen2ForCausalLM.from_pretrained(folder, assume_tp=tp_size)
    assert all(same_bits(tensor, weights[name]) for name, tensor in model.stock_state_dict().items())
    stock = stock_from_pretrained(folder, assume_tp=tp_size).state_dict()
    assert all(same_bits(stock[name], tensor) for name, tensor in weights.items())
    ordinary = write_folder(tmp_path / "ordinary", config, weights)
    for rank in range(tp_size):
        expected = Qwen2ForCausalLM.from_pretrained(ordinary, tp_size=tp_size, tp_rank=rank).state_dict()
        loaded = Qwen2ForCausalLM.from_pretrained(folder, tp_size=tp_size, tp_rank=rank, assume_tp=tp_size)
        assert all(same_bits(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_pickled_as_the_guide_s_transformers_may_save_it(by_guide: Path) -> None:
    torch.save(tensors_of(by_guide), by_guide / "pytorch_model.bin")
    model = Qwen2ForCausalLM.from_pretrained(by_guide, weights_file="pytorch_model.bin", assume_tp=2)
    assert all(same_bits(tensor, WEIGHTS[name]) for name, tensor in model.stock_state_dict().items())


@pytest.mark.parametrize("load", [Qwen2ForCausalLM.from_pretrained, stock_from_pretrained])
def test_without_it(load: Callable[[Path], object], by_guide: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has 4 merged tensors \(model\.layers\.0\.self_attn\.qkv\.") as caught:
        load(by_guide)
    assert "does not record for how many ranks" in str(caught.value)
    assert "--assume-tp N (assume_tp=N in Python; 1 for one card)" in str(caught.value)
    assert f"--unmerge --assume-tp N --model-path {by_guide} --output-path" in str(caught.value)


@pytest.mark.parametrize(
    ("assume_tp", "error", "message"),
    [
        (3, CheckpointError, "assume_tp=3 is not what it was merged for: .*3 ranks do not divide 4"),
        (8, CheckpointError, "assume_tp=8 is not what it was merged for: .*8 ranks do not divide 4"),
        (0, UnsupportedError, "assume_tp=0 must be a positive integer"),
        (True, UnsupportedError, "assume_tp=True must be a positive integer"),
        ("2", UnsupportedError, "assume_tp='2' must be a positive integer"),
    ],
)
def test_a_wrong_one(assume_tp: Any, error: type[Exception], message: str, by_guide: Path) -> None:
    with pytest.raises(error, match=message):
        Qwen2ForCausalLM.from_pretrained(by_guide, assume_tp=assume_tp)


def test_more_ranks_than_a_head_has_rows(tmp_path: Path) -> None:
    """Eight ranks for two kv heads of three pairs: the guide's script itself drops rows."""
    config = config_of(8, 2, head_dim=6)
    weights = weights_of(config)
    folder = write_folder(tmp_path / "guide", config, guide_merged(config, weights, 8))
    with pytest.raises(CheckpointError, match="8 ranks do not divide the 12 rows of k"):
        Qwen2ForCausalLM.from_pretrained(folder, assume_tp=8)


def test_where_it_says_nothing(merged: Path, ordinary: Path) -> None:
    with pytest.raises(UnsupportedError, match="records that it was merged for tp_size=2; leave assume_tp out"):
        Qwen2ForCausalLM.from_pretrained(merged, assume_tp=2)
    with pytest.raises(UnsupportedError, match=r"assume_tp=2: .* it is an ordinary checkpoint; leave assume_tp out"):
        Qwen2ForCausalLM.from_pretrained(ordinary, assume_tp=2)


# ---- folders that are broken ----------------------------------------------------------------------------------------
def record(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda values: values["qwen2_npu"].update(changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (record(version=2), "version=2, of a newer qwen2-npu; this one knows 1"),
        (record(layout="other"), "is no layout of merged weights; merge the original checkpoint again"),
        (record(tp_size="2"), "is no layout of merged weights"),
        (record(tp_size=True), "is no layout of merged weights"),
        (record(version=0), "is no layout of merged weights"),
        (record(version=True), "is no layout of merged weights"),
        (record(moved=None), "is no layout of merged weights"),
        (record(moved={"model.layers.0.self_attn.k_proj.weight": "../x.safetensors"}), "is no layout of merged"),
        (record(moved={"model.norm.weight": "x.safetensors"}), "is no layout of merged"),
        (record(tp_size=3), "tp_size=3 in config.json is not what it was merged for: .*3 ranks do not divide 4"),
        (record(tp_size=4), r"qkv_proj\.\w+ has shape \(16.*merged for tp_size=4 have 24 rows; merge the checkpoint"),
        (lambda folder: edit(folder, lambda v: v.update(qwen2_npu=[2])), r"qwen2_npu=\[2\] is no layout"),
        (lambda folder: edit(folder, lambda v: v.pop("qwen2_npu")), "does not record for how many ranks"),
        (
            lambda folder: rewrite(folder, lambda t: t.pop("model.layers.1.self_attn.qkv_proj.bias")),
            r"3 tensors missing, first model\.layers\.1\.self_attn\.k_proj\.bias",
        ),
        (
            lambda folder: rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(8)})),
            r"has both merged tensors \(.*qkv_proj.*\) and unmerged ones \(model\.layers\.0\.self_attn\.q_proj\.bias\)",
        ),
        (
            lambda folder: rewrite(folder, lambda t: t.update({"model.extra.weight": torch.ones(8)})),
            "1 tensors unexpected, first model.extra.weight",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-100]
            ),
            "is truncated or damaged",
        ),
    ],
)  # fmt: skip
def test_one_clear_error(spoil: Callable[[Path], object], message: str, merged: Path) -> None:
    spoil(merged)
    with pytest.raises(CheckpointError, match=message) as caught:
        Qwen2ForCausalLM.from_pretrained(merged)
    assert "\n" not in str(caught.value)
    assert str(merged) in str(caught.value)


@pytest.mark.parametrize("shape", [(15, 8), (17, 8), ()], ids=str)
@pytest.mark.parametrize("guide", [False, True], ids=["recorded", "by the guide"])
def test_another_number_of_rows(shape: tuple[int, ...], guide: bool, merged: Path, by_guide: Path) -> None:
    """q, k and v of the model have 8, 4 and 4, however many ranks share them."""
    folder = by_guide if guide else merged
    name = f"model.layers.1.self_attn.{'qkv' if guide else 'qkv_proj'}.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))
    way_out = "pass the tp_size that it was merged for" if guide else "merge the checkpoint again"
    message = f"{name} has shape {shape}, and q, k and v merged for tp_size=2 have 16 rows; {way_out}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Qwen2ForCausalLM.from_pretrained(folder, assume_tp=2 if guide else None)


# ---- the stock model ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_the_stock_model_of_a_merged_folder(merged: Path, ordinary: Path, dtype: Any) -> None:
    (merged / "generation_config.json").write_text('{"max_length": 77}')
    unmerged = stock_from_pretrained(merged, dtype=dtype)
    expected = stock_from_pretrained(ordinary, dtype=dtype)
    assert unmerged.dtype == expected.dtype
    assert unmerged.generation_config.max_length == 77
    assert unmerged.config._attn_implementation == expected.config._attn_implementation == "eager"
    built = stock_from_state_dict(CONFIG, WEIGHTS, dtype=expected.dtype)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        logits = [model(ids).logits for model in (unmerged, expected, built)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_record_round_trips() -> None:
    assert Layout(2).record() == {"layout": "fused_qkv", "tp_size": 2, "version": 1}
