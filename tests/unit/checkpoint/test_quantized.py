"""Checkpoints with 8-bit weights: read whole and in parts, dequantised, written back, and every fault in one named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qwen2_npu import Optimizations, Qwen2ForCausalLM, Qwen2Model
from qwen2_npu.checkpoint import quantized, weights
from qwen2_npu.checkpoint.sources import FirstLayers, StateDictSource, open_checkpoint, part_of
from qwen2_npu.checkpoint.weights import check_source, held_shapes, stock_shapes
from qwen2_npu.compat import IS_V4
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.parallel.sharding import Shard, Slice
from tests.unit.checkpoint.merges import digest, same_bits, tensors_of
from tests.unit.checkpoint.quantised_folders import (
    SCHEMES,
    as_stored,
    in_float64,
    quantised_config,
    quantised_weights,
    quantization_config,
    write_quantised,
)
from tests.unit.parallel.test_sharding import mixture

DOWN = "model.layers.0.mlp.down_proj"
SHARD = "model-00002-of-00003.safetensors"

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("quantised")
    return {scheme: write_quantised(path / scheme, scheme, shards=3) for scheme in SCHEMES}


def in_bfloat16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in in_float64(tensors).items()}


# ---- a source --------------------------------------------------------------------------------------------------------
@every_scheme
@pytest.mark.parametrize("shards", [None, 3])
def test_integers_and_scales_whatever_the_files(scheme: str, shards: int | None, tmp_path: Path) -> None:
    source = open_checkpoint(write_quantised(tmp_path / "checkpoint", scheme, shards=shards))
    expected = quantised_weights(quantised_config(scheme))
    check_source(source)
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert source.stored_dtype() == torch.bfloat16
    found = dict(source.tensors())
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
    read = source.read(list(expected))
    assert all(same_bits(read[name], tensor) for name, tensor in expected.items())
    assert list(source.read([f"{DOWN}.weight"])) == [f"{DOWN}.weight"]


def test_sizes_that_are_stored() -> None:
    """Four integers to an int32, the last of a row with what is left; all else as it is."""
    tensors = {"a.weight": torch.zeros(3, 10, dtype=torch.int8), "a.weight_scale": torch.zeros(3, 1)}
    scale = {"a.weight_scale": ((3, 1), torch.float32)}
    packed = {"a.weight_packed": ((3, 3), torch.int32), "a.weight_shape": ((2,), torch.int64), **scale}
    plain = {"a.weight": ((3, 10), torch.int8), **scale}
    for expected, how in ((packed, True), (plain, False)):
        found = quantized.stored_sizes(tensors, packed=how)
        assert {name: (tuple(each.shape), each.dtype) for name, each in found.items()} == expected
        assert all(each.is_meta for each in found.values())


def test_a_scale_comes_right_before_its_weight(folders: dict[str, Path]) -> None:
    """Who dequantises keeps one of them, and not all."""
    names = [name for name, _ in open_checkpoint(folders["w8a16"]).tensors()]
    for index, name in enumerate(names):
        if name.endswith("_scale"):
            assert names[index + 1] == name.removesuffix("_scale")


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(SCHEMES), st.integers(1, 7), st.integers(1, 19), st.data())
def test_any_part_of_any_shape(scheme: str, rows: int, columns: int, data: st.DataObject) -> None:
    """Of packed integers the borders lie anywhere in an int32."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    weight = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.rand(rows, 1, generator=generator) + 0.5
    stock = {f"{DOWN}.weight": weight, f"{DOWN}.weight_scale": scale}
    config = quantised_config(scheme)
    source = quantized.present(StateDictSource(config, as_stored(stock, scheme)))
    axis = data.draw(st.sampled_from([0, 1]))
    start = data.draw(st.integers(0, weight.shape[axis] - 1))
    stop = data.draw(st.integers(start + 1, weight.shape[axis]))
    part = Slice(axis, start, stop)
    found = dict(source.tensors(lambda name: part if axis == 0 or name.endswith("weight") else None))
    assert torch.equal(found[f"{DOWN}.weight"], part_of(weight, part))
    assert torch.equal(found[f"{DOWN}.weight_scale"], part_of(scale, part) if axis == 0 else scale)
    assert torch.equal(source.read([f"{DOWN}.weight"])[f"{DOWN}.weight"], weight)


@every_scheme
def test_the_first_layers(scheme: str, folders: dict[str, Path]) -> None:
    found = dict(FirstLayers(open_checkpoint(folders[scheme]), 1).tensors())
    expected = quantised_weights(quantised_config(scheme))
    assert found.keys() == {name for name in expected if "layers.1" not in name}
    model = Qwen2ForCausalLM.from_pretrained(folders[scheme], num_hidden_layers=1)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected[f"{DOWN}.weight"])


@pytest.mark.parametrize("form", ["naive-quantized", "int-quantized", "pack-quantized"])
def test_either_scheme_in_any_format(form: str, tmp_path: Path) -> None:
    for scheme in SCHEMES:
        config = quantised_config(scheme)
        config.quantization_config["format"] = form
        expected = quantised_weights(config)
        stored = as_stored(expected, "w8a16" if form == "pack-quantized" else "w8a8")
        model = Qwen2ForCausalLM.from_state_dict(config, stored, dtype=torch.bfloat16)
        assert model.optimizations.scheme == scheme
        assert all(same_bits(tensor, expected[name]) for name, tensor in model.stock_state_dict().items())
        model.save_pretrained(tmp_path / scheme)
        found = load_file(tmp_path / scheme / "model.safetensors")
        assert all(same_bits(found[name], tensor) for name, tensor in stored.items())


def test_names_of_a_base_model(tmp_path: Path) -> None:
    """transformers writes such a folder of a stock model without a head."""
    config = quantised_config("w8a16")
    stored = as_stored(quantised_weights(config), "w8a16")
    base = {name.removeprefix("model."): tensor for name, tensor in stored.items() if name != "lm_head.weight"}
    config.save_pretrained(tmp_path)
    save_file(base, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_checkpoint(tmp_path)
    check_source(source, ())
    assert f"{DOWN}.weight_scale" in source.shapes()
    for model in (Qwen2Model.from_pretrained(tmp_path), Qwen2Model.from_state_dict(config, base)):
        assert model.optimizations.scheme == "w8a16"
        assert same_bits(model.stock_state_dict()["norm.weight"], base["norm.weight"])


# ---- a model ---------------------------------------------------------------------------------------------------------
@every_scheme
def test_a_folder_runs_in_8_bits(scheme: str, folders: dict[str, Path]) -> None:
    model = Qwen2ForCausalLM.from_pretrained(folders[scheme])
    expected = quantised_weights(quantised_config(scheme))
    assert model.optimizations.scheme == scheme
    assert model.dtype == torch.bfloat16
    found = model.stock_state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == stock_shapes(model.config)
    assert all(same_bits(tensor, expected[name]) for name, tensor in found.items())


@every_scheme
@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["apart", "fused"])
def test_dequantised_while_it_is_read(scheme: str, optimizations: Optimizations, folders: dict[str, Path]) -> None:
    model = Qwen2ForCausalLM.from_pretrained(folders[scheme], optimizations=optimizations)
    expected = in_bfloat16(quantised_weights(quantised_config(scheme)))
    found = model.stock_state_dict()
    assert found.keys() == expected.keys()
    assert all(same_bits(tensor, expected[name]) for name, tensor in found.items())
    assert getattr(model.config, "quantization_config", None) is None, "its weights are ordinary ones"


@every_scheme
def test_dequantised_and_saved_it_is_an_ordinary_folder(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = Qwen2ForCausalLM.from_pretrained(folders[scheme], optimizations=Optimizations.none())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert again.optimizations.scheme is None
    assert all(same_bits(one, model.stock_state_dict()[name]) for name, one in again.stock_state_dict().items())


@every_scheme
def test_saved_it_is_the_same_bit_for_bit(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = Qwen2ForCausalLM.from_pretrained(folders[scheme])
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) >= 3
    stored = tensors_of(folders[scheme])
    for folder in (tmp_path / "one", tmp_path / "many"):
        found = tensors_of(folder)
        assert found.keys() == stored.keys()
        assert all(same_bits(found[name], tensor) for name, tensor in stored.items())
        said = [json.loads((each / "config.json").read_text()) for each in (folder, folders[scheme])]
        assert said[0]["quantization_config"] == said[1]["quantization_config"]
    Qwen2ForCausalLM.from_pretrained(tmp_path / "many").save_pretrained(tmp_path / "again")
    one, again = (digest(tmp_path / name)["model.safetensors"] for name in ("one", "again"))
    assert one == again


@every_scheme
def test_a_state_dict_as_the_model_gives_it(scheme: str, folders: dict[str, Path]) -> None:
    model = Qwen2ForCausalLM.from_pretrained(folders[scheme])
    again = Qwen2ForCausalLM.from_state_dict(model.config, model.stock_state_dict())
    assert again.optimizations == model.optimizations
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())
    again.load_state_dict(model.state_dict())


@every_scheme
def test_a_configuration_of_transformers(scheme: str, folders: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(folders[scheme])
    assert Qwen2ForCausalLM.from_pretrained(folders[scheme], config=config).optimizations.scheme == scheme
    del config.quantization_config
    message = r"is stored as I(8|32), which is quantised or no weight; .* whose quantization_config says how it is"
    with pytest.raises(CheckpointError, match=message):
        Qwen2ForCausalLM.from_pretrained(folders[scheme], config=config)


@every_scheme
def test_the_network_alone(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = Qwen2Model.from_pretrained(folders[scheme])
    expected = quantised_weights(quantised_config(scheme))
    assert same_bits(model.stock_state_dict()["layers.0.mlp.down_proj.weight"], expected[f"{DOWN}.weight"])
    model.save_pretrained(tmp_path)
    again = Qwen2Model.from_pretrained(tmp_path).stock_state_dict()
    assert all(same_bits(again[name], tensor) for name, tensor in model.stock_state_dict().items())


def test_integers_that_the_configuration_does_not_speak_of(folders: dict[str, Path]) -> None:
    model = Qwen2ForCausalLM.from_pretrained(folders["w8a8"])
    state = model.stock_state_dict()
    del model.config.quantization_config
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is stored as torch\.int8, which is quantised or no"):
        Qwen2ForCausalLM.from_state_dict(model.config, state)


@every_scheme
def test_another_dtype(scheme: str, folders: dict[str, Path]) -> None:
    """The integers stay; scales are converted as all else is. Dequantised, the numbers are those of 8 bits."""
    expected = quantised_weights(quantised_config(scheme))
    for dtype in (torch.float32, torch.float16):
        model = Qwen2ForCausalLM.from_pretrained(folders[scheme], dtype=dtype)
        found = model.stock_state_dict()
        assert all(
            same_bits(tensor, expected[name] if tensor.dtype == torch.int8 else expected[name].to(dtype))
            for name, tensor in found.items()
        )
        plain = Qwen2ForCausalLM.from_pretrained(folders[scheme], dtype=dtype, optimizations=Optimizations.none())
        meant = {name: tensor.to(dtype) for name, tensor in in_float64(found).items()}
        assert all(same_bits(tensor, meant[name]) for name, tensor in plain.stock_state_dict().items())


@pytest.mark.parametrize("optimizations", [None, Optimizations.none()], ids=["8-bit", "dequantised"])
@pytest.mark.parametrize(("value", "fault"), [(1e-9, "0.0"), (1e6, "inf")])
def test_a_scale_that_a_dtype_does_not_hold(value: float, fault: str, optimizations: Any, tmp_path: Path) -> None:
    folder = write_quantised(tmp_path / "checkpoint", "w8a8")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{DOWN}.weight_scale"][3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert Qwen2ForCausalLM.from_pretrained(folder, optimizations=optimizations).dtype == torch.bfloat16
    message = rf"down_proj\.weight_scale in torch\.float16 is {fault} in row 3 .*; load the checkpoint with dtype='bfl"
    with pytest.raises(CheckpointError, match=message):
        Qwen2ForCausalLM.from_pretrained(folder, dtype="float16", optimizations=optimizations)


@pytest.mark.skipif(IS_V4, reason="this transformers has no Qwen2Moe")
@every_scheme
def test_a_mixture_of_experts_is_dequantised(scheme: str) -> None:
    """It is not computed in 8 bits: asked for by default, that is refused with the way out."""
    config = mixture(quantization_config=quantization_config(scheme, ("lm_head", "re:.*gate$")))
    tensors = quantised_weights(config)
    assert tensors["model.layers.0.mlp.experts.2.down_proj.weight"].dtype == torch.int8
    stored = as_stored(tensors, scheme)
    with pytest.raises(UnsupportedError, match=rf"{scheme}: a mixture of experts .* pass optimizations=Optimizations"):
        Qwen2ForCausalLM.from_state_dict(config, stored)
    for optimizations in (Optimizations.all(), Optimizations.none()):
        model = Qwen2ForCausalLM.from_state_dict(config, stored, optimizations=optimizations)
        expected = in_bfloat16(tensors)
        assert all(same_bits(tensor, expected[name]) for name, tensor in model.stock_state_dict().items())


# ---- several ranks ---------------------------------------------------------------------------------------------------
@every_scheme
@pytest.mark.parametrize("heads", [4, 7], ids=["aligned", "torn"])
def test_a_rank_reads_its_rows_or_columns(scheme: str, heads: int, tmp_path: Path) -> None:
    """Seven ranks cut o_proj's 14 columns inside of an int32. Scales are cut with rows, and whole where columns are."""
    ranks = heads
    folder = write_quantised(tmp_path / "checkpoint", scheme, heads=heads, kv_heads=heads, shards=2)
    config = open_checkpoint(folder).config
    whole = quantised_weights(config)
    for rank in range(ranks):
        shard = Shard(rank, ranks)
        source = open_checkpoint(folder)
        found = dict(source.tensors(lambda name, shard=shard: shard.slice_of(name, config)))
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == held_shapes(config, shard)
        for name, tensor in found.items():
            assert torch.equal(tensor, part_of(whole[name], shard.slice_of(name, config))), name
        module = "model.layers.0.self_attn"
        assert found[f"{module}.o_proj.weight"].shape == (2 * heads, 2 * heads // ranks)
        assert found[f"{module}.o_proj.weight_scale"].shape == (2 * heads, 1)
        assert found[f"{module}.q_proj.weight_scale"].shape == (2 * heads // ranks, 1)


@every_scheme
@pytest.mark.parametrize("optimizations", [None, Optimizations.none(), Optimizations.all()], ids=["8", "apart", "all"])
def test_a_rank_s_model(scheme: str, optimizations: Any, folders: dict[str, Path]) -> None:
    whole = Qwen2ForCausalLM.from_pretrained(folders[scheme], optimizations=optimizations).stock_state_dict()
    for rank in range(2):
        model = Qwen2ForCausalLM.from_pretrained(folders[scheme], optimizations=optimizations, tp_size=2, tp_rank=rank)
        held = weights.stock_state_dict(model)
        assert held.keys() == whole.keys()
        for name, tensor in held.items():
            expected = part_of(whole[name], Shard(rank, 2).slice_of(name, model.config))
            assert torch.equal(tensor, expected), name


def test_only_the_rank_s_part_of_packed_rows_is_read(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    source = open_checkpoint(folders["w8a16"])
    read: dict[str, int] = {}
    pieces = source.inner.pieces

    def counted(cuts: Callable[[str], Any]) -> Any:
        for name, found in pieces(cuts):
            read[name] = sum(piece.numel() for piece in found)
            yield name, found

    monkeypatch.setattr(source.inner, "pieces", counted)
    list(source.tensors(lambda name: Shard(1, 2).slice_of(name, source.config)))
    assert read[f"{DOWN}.weight_packed"] == 8 * 168 // 4 // 2
    assert read[f"{DOWN}.weight_scale"] == read[f"{DOWN}.weight_shape"] == 0, "they were read when it was opened"
