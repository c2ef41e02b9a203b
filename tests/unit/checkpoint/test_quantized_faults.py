"""Every fault in a checkpoint with 8-bit weights is named, and faults of the reader itself would be seen."""

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
from qwen2_npu.checkpoint import quantized
from qwen2_npu.checkpoint.merging import merge_qkv, unmerge_qkv
from qwen2_npu.checkpoint.quantized import QuantizedSource
from qwen2_npu.checkpoint.sources import StateDictSource
from qwen2_npu.errors import CheckpointError, UnsupportedError
from tests.unit.checkpoint.merges import weights_of, write_folder
from tests.unit.checkpoint.quantised_folders import (
    SCHEMES,
    as_stored,
    in_float64,
    packed_by_hand,
    quantised_config,
    quantised_weights,
    write_quantised,
)

DOWN = "model.layers.0.mlp.down_proj"

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("quantised")
    return {scheme: write_quantised(path / scheme, scheme, shards=3) for scheme in SCHEMES}


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def other(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def added(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def with_row(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale = scale.clone()
        scale[2:4] = value
        return scale

    return change


FAULTS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no scale": ("w8a8", without(f"{DOWN}.weight_scale"), r"down_proj\.weight_scale is missing, and .*weight is there"),
    "no scale, packed": ("w8a16", without(f"{DOWN}.weight_scale"), r"weight_scale is missing, and .*weight_packed is"),
    "no weight": ("w8a8", without(f"{DOWN}.weight"), r"1 tensors missing, first model.*down_proj\.weight"),
    "no packed weight": ("w8a16", without(f"{DOWN}.weight_packed"), r"1 tensors missing, first .*down_proj\.weight"),
    "no shape": ("w8a16", without(f"{DOWN}.weight_shape"), r"weight_shape is missing, and .*weight_packed is there"),
    "scales of another model": (
        "w8a8",
        other(f"{DOWN}.weight_scale", lambda scale: scale[:-1]),
        r"weight_scale has shape \(7, 1\), and one scale per row is \(8, 1\)",
    ),
    "scales in one row": (
        "w8a8",
        other(f"{DOWN}.weight_scale", lambda scale: scale.t()),
        r"weight_scale has shape \(1, 8\), and one scale per row is \(8, 1\)",
    ),
    "scales per group": (
        "w8a16",
        other(f"{DOWN}.weight_scale", lambda scale: scale.repeat(1, 2)),
        r"weight_scale has shape \(8, 2\), and one scale per row is \(8, 1\)",
    ),
    "flat scales": ("w8a8", other(f"{DOWN}.weight_scale", torch.flatten), r"weight_scale has shape \(8,\), and one"),
    "integers as scales": (
        "w8a8",
        other(f"{DOWN}.weight_scale", lambda scale: scale.to(torch.int8)),
        r"weight_scale is stored as int8, and quantization_config says bfloat16 or float16",
    ),
    "NaN": ("w8a8", other(f"{DOWN}.weight_scale", with_row(float("nan"))), r"is nan in row 2 \(2 such rows\), and a s"),
    "infinity": ("w8a16", other(f"{DOWN}.weight_scale", with_row(float("inf"))), r"is inf in row 2 \(2 such rows\)"),
    "negative": ("w8a16", other(f"{DOWN}.weight_scale", with_row(-0.5)), r"is -0\.5 in row 2 \(2 such rows\)"),
    "zero": (
        "w8a8",
        other(f"{DOWN}.weight_scale", with_row(0.0)),
        r"is 0\.0 in row 2 .* must be a finite number",
    ),
    "another shape recorded": (
        "w8a16",
        other(f"{DOWN}.weight_shape", lambda shape: torch.tensor([8, 100])),
        r"weight_packed has shape \(8, 42\), and .*weight_shape is \[8, 100\]: .* that is \(8, 25\)",
    ),
    "other rows recorded": (
        "w8a16",
        other(f"{DOWN}.weight_shape", lambda shape: torch.tensor([9, 168])),
        r"weight_packed has shape \(8, 42\), and .*weight_shape is \[9, 168\]",
    ),
    "no shape of a matrix": (
        "w8a16",
        other(f"{DOWN}.weight_shape", lambda shape: torch.tensor([8, 168, 1])),
        r"weight_shape is \[8, 168, 1\], and must be two positive sizes",
    ),
    "a negative shape": (
        "w8a16",
        other(f"{DOWN}.weight_shape", lambda shape: torch.tensor([-8, 168])),
        r"weight_shape is \[-8, 168\], and must be two positive sizes",
    ),
    "a shape in numbers with a fraction": (
        "w8a16",
        other(f"{DOWN}.weight_shape", lambda shape: shape.float()),
        r"weight_shape is stored as float32, and quantization_config says int64 or int32",
    ),
    "a packed width": (
        "w8a16",
        other(f"{DOWN}.weight_packed", lambda packed: packed[:, :-1]),
        r"weight_packed has shape \(8, 41\), and .*weight_shape is \[8, 168\]: with 4 .* that is \(8, 42\)",
    ),
    "another width, told alike": (
        "w8a16",
        lambda tensors: tensors.update(
            {
                f"{DOWN}.weight_packed": tensors[f"{DOWN}.weight_packed"][:, :-1],
                f"{DOWN}.weight_shape": torch.tensor([8, 164]),
            }
        ),
        r"1 tensors mis-shaped, first .*down_proj\.weight has shape \(8, 164\), expected \(8, 168\)",
    ),
    "integers of another model": (
        "w8a8",
        other(f"{DOWN}.weight", lambda weight: weight[:, :-4]),
        r"1 tensors mis-shaped, first .*down_proj\.weight has shape \(8, 164\), expected \(8, 168\)",
    ),
    "a weight that is not quantised": (
        "w8a8",
        other(f"{DOWN}.weight", lambda weight: weight.to(torch.bfloat16)),
        r"down_proj\.weight is stored as bfloat16, and quantization_config says int8; add .*down_proj to ignore in",
    ),
    "packed in another dtype": (
        "w8a16",
        other(f"{DOWN}.weight_packed", lambda packed: packed.to(torch.int64)),
        r"weight_packed is stored as int64, and quantization_config says int32",
    ),
    "a weight twice": (
        "w8a16",
        added(f"{DOWN}.weight", torch.zeros(8, 168, dtype=torch.int8)),
        r"down_proj\.weight(_packed)? and .*down_proj\.weight(_packed)? are both there, and are one weight",
    ),
    "a quantised head": (
        "w8a8",
        added("lm_head.weight_scale", torch.ones(24, 1)),
        r"lm_head\.weight_scale is there, and quantization_config does not say that lm_head is quantised, or",
    ),
    "a head of integers": (
        "w8a8",
        other("lm_head.weight", lambda weight: weight.to(torch.int8)),
        r"lm_head\.weight is stored as int8, which is quantised or no weight; use the checkpoint in bf16",
    ),
    "zero points": (
        "w8a8",
        added(f"{DOWN}.weight_zero_point", torch.zeros(8, 1, dtype=torch.int8)),
        r"weight_zero_point holds zero points of integers that are not symmetric, which is not s",
    ),
    "an order of columns": (
        "w8a16",
        added(f"{DOWN}.weight_g_idx", torch.zeros(168, dtype=torch.int32)),
        r"weight_g_idx holds the order of columns \(actorder\), which is not served",
    ),
    "static activations": ("w8a8", added(f"{DOWN}.input_scale", torch.ones(1)), "input_scale holds scales of activati"),
    "a KV cache": ("w8a8", added("model.layers.0.self_attn.k_scale", torch.ones(1)), "k_scale holds scales of the KV"),
}


@pytest.mark.parametrize(("scheme", "fault", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_one_line_with_tensor_and_way_out(
    scheme: str, fault: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    folder = write_quantised(tmp_path / "checkpoint", scheme)
    tensors = load_file(folder / "model.safetensors")
    fault(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        Qwen2ForCausalLM.from_pretrained(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}")
    assert "\n" not in text
    assert any(way_out in text for way_out in ("; fetch it again", "; quantise", "; use the", "; add model."))


def source_of(scheme: str, **changes: torch.Tensor) -> QuantizedSource:
    """Of one module; ``changes`` are other tensors of it."""
    integers = torch.ones(3, 8, dtype=torch.int8)
    stock = {f"{DOWN}.weight": integers, f"{DOWN}.weight_scale": torch.ones(3, 1), "model.norm.weight": torch.ones(4)}
    stored = as_stored(stock, scheme) | {f"{DOWN}.{name}": tensor for name, tensor in changes.items()}
    found = quantized.present(StateDictSource(quantised_config(scheme), stored))
    assert isinstance(found, QuantizedSource)
    return found


UNSERVED = (
    "weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale", "input_zero_point",
    "input_global_scale", "output_scale", "k_scale", "v_scale", "bitmask",
)  # fmt: skip


@pytest.mark.parametrize("name", UNSERVED)
def test_tensors_of_other_schemes_are_refused_by_what_they_are(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"down_proj\.{name} holds [\w (),]+, which is not served; fetch"):
        source_of("w8a8", **{name: torch.ones(1)})


def test_every_tensor_of_the_table_is_refused_here() -> None:
    assert set(quantized.UNSERVED) == set(UNSERVED)


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        ("weight_scale", "bfloat16 float16 float32 float64", "int8 int64 bool float8_e4m3fn"),
        ("weight_shape", "int64 int32", "int16 uint8 float32"),
        ("weight_packed", "int32", "int64 uint8 float32"),
        ("weight", "int8", "uint8 int16 int32 float32 bfloat16"),
    ],
)
def test_dtypes_that_tensors_are_stored_in(kind: str, taken: str, refused: str) -> None:
    scheme = "w8a8" if kind == "weight" else "w8a16"
    stored = dict(source_of(scheme).inner.tensors())[f"{DOWN}.{kind}"]
    for dtype in taken.split():
        found = source_of(scheme, **{kind: stored.to(getattr(torch, dtype))})
        assert torch.equal(found.read([f"{DOWN}.weight"])[f"{DOWN}.weight"], torch.ones(3, 8, dtype=torch.int8))
    for dtype in refused.split():
        with pytest.raises(CheckpointError, match=rf"{kind} is stored as (torch\.)?{dtype}, "):
            source_of(scheme, **{kind: stored.to(getattr(torch, dtype))})


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", DOWN, "model.layers.1.mlp.down_proj"])
def test_every_module_is_looked_at(module: str) -> None:
    """The first, one in between, and the last."""
    config = quantised_config("w8a16")
    stored = as_stored(quantised_weights(config), "w8a16")
    assert quantized.present(StateDictSource(config, stored)).shapes()
    scale, packed = f"{module}.weight_scale", f"{module}.weight_packed"
    faults = {
        scale: (None, stored[scale][:-1], -stored[scale]),
        packed: (stored[packed].long(), stored[packed][:-1]),
        f"{module}.weight_shape": (None, torch.tensor([0, 1]), torch.tensor([2, 4])),
    }
    for name, others in faults.items():
        for tensor in others:
            spoiled = {each: stored[each] for each in stored if each != name}
            with pytest.raises(CheckpointError, match=re.escape(name)):
                quantized.present(StateDictSource(config, spoiled if tensor is None else spoiled | {name: tensor}))


def test_other_tensors_of_a_quantised_module_are_floating_point_numbers() -> None:
    assert f"{DOWN}.bias" in source_of("w8a8", bias=torch.ones(3)).shapes()
    for name in ("bias", "zeros"):
        with pytest.raises(CheckpointError, match=rf"down_proj\.{name} is stored as int32, which is quantised or no w"):
            source_of("w8a8", **{name: torch.ones(3, dtype=torch.int32)})


def test_a_weight_twice_in_either_order() -> None:
    integers = torch.ones(3, 8, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"weight_packed and \S+\.weight are both there, and are one weight"):
        source_of("w8a16", weight=integers)
    with pytest.raises(CheckpointError, match=r"weight and \S+\.weight_packed are both there, and are one weight"):
        source_of("w8a8", weight_packed=packed_by_hand(integers))


@pytest.mark.parametrize("sizes", [[0, 8], [3, 0], [-1, 8], [3], [], [3, 8, 1], 3, [[3, 8]]], ids=str)
def test_shapes_that_no_weight_has(sizes: Any) -> None:
    with pytest.raises(CheckpointError, match=r"weight_shape is .*, and must be two positive sizes; fetch"):
        source_of("w8a16", weight_shape=torch.tensor(sizes, dtype=torch.int64))


def test_the_dtype_is_that_of_what_is_not_quantised() -> None:
    """Not of the scales; float32 where there is nothing else."""
    assert source_of("w8a8", weight_scale=torch.ones(3, 1).half(), bias=torch.ones(3)).stored_dtype() == torch.float32
    stock = {f"{DOWN}.weight_scale": torch.ones(3, 1).half(), f"{DOWN}.weight": torch.ones(3, 8, dtype=torch.int8)}
    alone = quantized.present(StateDictSource(quantised_config("w8a8"), stock))
    assert alone.stored_dtype() == torch.float32
    beside = quantized.present(StateDictSource(quantised_config("w8a8"), stock | {"a.bias": torch.ones(3).double()}))
    assert beside.stored_dtype() == torch.float64


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-30, float("inf"), float("-inf"), float("nan")])
def test_scales_that_no_weight_has(value: float) -> None:
    """Whichever row it is in, and however many are right."""
    least = torch.finfo(torch.float32).smallest_normal
    assert source_of("w8a8", weight_scale=torch.full((3, 1), least)).shapes()
    for row in range(3):
        scale = torch.full((3, 1), least)
        scale[row] = value
        with pytest.raises(
            CheckpointError, match=rf"weight_scale is \S+ in row {row} \(1 such rows\), and a scale must"
        ):
            source_of("w8a8", weight_scale=scale)


def test_merged_and_quantised_is_no_checkpoint(tmp_path: Path) -> None:
    config = quantised_config("w8a8")
    said = config.quantization_config
    del config.quantization_config
    ordinary = write_folder(tmp_path / "ordinary", config, weights_of(config))
    merge_qkv(ordinary, tmp_path / "merged")
    path = tmp_path / "merged" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    with pytest.raises(CheckpointError, match=r"merged q, k and v in floating-point numbers, and quantization_config"):
        Qwen2ForCausalLM.from_pretrained(tmp_path / "merged")


@every_scheme
def test_no_merging_of_8_bit_weights(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for command in (merge_qkv, unmerge_qkv):
        with pytest.raises(CheckpointError, match=rf"has 8-bit weights \({scheme}\), .*: load it as it is; q, k and v"):
            command(folders[scheme], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@every_scheme
def test_no_adapter_to_8_bit_weights(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    way_out = "merge the adapter into the checkpoint in floating-point numbers, quantise the merged folder with"
    for optimizations in (None, Optimizations.none()):
        with pytest.raises(UnsupportedError, match=f"adapter='{tmp_path}': .* are 8-bit integers; {way_out}"):
            Qwen2ForCausalLM.from_pretrained(folders[scheme], adapter=tmp_path, optimizations=optimizations)
    model = Qwen2ForCausalLM.from_pretrained(folders[scheme])
    for call in (model.load_adapter, model.add_adapter, lambda: model.peft_config):
        with pytest.raises(UnsupportedError, match=f"are 8-bit integers; {way_out}"):
            call()


# ---- negative controls -----------------------------------------------------------------------------------------------
def neighbours_scale(source: QuantizedSource) -> None:
    for name, scale in source._scales.items():
        source._scales[name] = scale.roll(1, 0)


def by_columns(integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale along the wrong axis, of a square weight."""
    return (integers.double() * scale.double().view(1, -1)).to(dtype)


def packed_backwards(integers: torch.Tensor) -> torch.Tensor:
    return packed_by_hand(integers).view(torch.uint8).view(-1, 4).flip(1).reshape(len(integers), -1).view(torch.int32)


def packed_along_rows(integers: torch.Tensor) -> torch.Tensor:
    """Four rows in an int32, of a square weight."""
    return packed_by_hand(integers.t().contiguous()).t().contiguous()


def packed_with_127(integers: torch.Tensor) -> torch.Tensor:
    return packed_by_hand(integers.clamp(min=-127) - 1)


def read_back(stored: dict[str, torch.Tensor], spoil: Callable[[QuantizedSource], object] = lambda source: None) -> Any:
    source = quantized.present(StateDictSource(quantised_config("w8a16"), stored))
    spoil(source)
    floats = quantized.Dequantized(source, torch.float32)
    found = dict(floats.tensors())
    assert floats.shapes() == {name: tuple(tensor.shape) for name, tensor in found.items()}
    return found


@pytest.mark.parametrize("fault", ["none", "neighbour's scale", "backwards", "127", "along rows", "wrong axis"])
def test_faults_of_ours_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above with each fault: it finds all of them, and nothing where there is none."""
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = torch.randint(-127, 128, (16, 16), generator=generator).to(torch.int8)
    stock = {name: weight, f"{name}_scale": torch.rand(16, 1, generator=generator) + 0.5}
    stored = as_stored(stock, "w8a16")
    pack = {"backwards": packed_backwards, "127": packed_with_127, "along rows": packed_along_rows}.get(fault)
    if pack is not None:
        spoiled = pack(weight)
        assert spoiled.numel() == stored[f"{name}_packed"].numel()
        stored[f"{name}_packed"] = spoiled.reshape(16, 4)
    if fault == "wrong axis":
        monkeypatch.setattr(quantized, "dequantise", by_columns)
    found = read_back(stored, neighbours_scale if fault == "neighbour's scale" else lambda source: None)
    expected = in_float64(stock)[name].float()
    assert torch.equal(found[name], expected) is (fault == "none")
