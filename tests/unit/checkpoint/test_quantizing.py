"""`qwen2-npu quantize`: what it writes, what it refuses, and that a run that was killed is taken up."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import byte_ranges
from qwen2_npu.checkpoint.folders import QUANTISING
from qwen2_npu.checkpoint.merging import merge_qkv
from qwen2_npu.checkpoint.quantization import described, quantization_of
from qwen2_npu.checkpoint.quantizing import plan_quantize, quantize
from qwen2_npu.compat import IS_V4
from qwen2_npu.conformance import tiny, tiny_moe
from qwen2_npu.errors import CheckpointError, UnsupportedError
from tests.unit.checkpoint.merges import config_of, digest, same_bits, tensors_of, weights_of, write_folder
from tests.unit.checkpoint.quantised_folders import SCHEMES, packed_by_hand
from tests.unit.checkpoint.test_merging import Killed, interrupted
from tests.unit.memory import least_peak

CONFIG = config_of(4, 2)
DOWN = "model.layers.0.mlp.down_proj"

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("quantizing") / "ordinary", CONFIG, weights_of(CONFIG), shards=3)


def by_numpy(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales in float64, but for the scale's dtype: written anew."""
    exact = weight.double().numpy()
    scale = torch.from_numpy(np.abs(exact).max(axis=1, keepdims=True) / 127).to(weight.dtype)
    scale[scale == 0] = torch.finfo(weight.dtype).eps
    integers = np.clip(np.rint(exact / scale.double().numpy()), -127, 127).astype(np.int8)
    return torch.from_numpy(integers), scale


def expected_of(stored: dict[str, torch.Tensor], scheme: str, kept: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if "_proj" not in name or name.endswith("bias") or any(part in module for part in kept):
            found[name] = tensor
            continue
        integers, found[f"{module}.weight_scale"] = by_numpy(tensor)
        if scheme == "w8a8":
            found[name] = integers
        else:
            found[f"{module}.weight_packed"] = packed_by_hand(integers)
            found[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


# ---- what is written -------------------------------------------------------------------------------------------------
@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_tensor(scheme: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time: none of a chunk's borders shows."""
    monkeypatch.setattr(byte_ranges, "CHUNK", 100)
    weights = weights_of(CONFIG, dtype)
    weights[f"{DOWN}.weight"][3] = 0  # a row without a largest value
    folder = write_folder(tmp_path / "ordinary", CONFIG, weights)
    quantize(folder, tmp_path / "written", scheme=scheme)
    assert_same(load_file(tmp_path / "written" / "model.safetensors"), expected_of(weights, scheme))
    assert Qwen2ForCausalLM.from_pretrained(tmp_path / "written").optimizations.scheme == scheme


@every_scheme
def test_columns_that_do_not_fill_an_int32(scheme: str, tmp_path: Path) -> None:
    config = config_of(7, 7, layers=1)  # 14 inputs
    weights = weights_of(config)
    quantize(write_folder(tmp_path / "ordinary", config, weights), tmp_path / "written", scheme=scheme)
    assert_same(tensors_of(tmp_path / "written"), expected_of(weights, scheme))
    Qwen2ForCausalLM.from_pretrained(tmp_path / "written")


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_it_writes_is_what_the_model_saves(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """One format, byte for byte, with its header."""
    folder = write_folder(tmp_path / "ordinary", CONFIG, weights_of(CONFIG, dtype))
    quantize(folder, tmp_path / "written", scheme=scheme)
    Qwen2ForCausalLM.from_pretrained(tmp_path / "written").save_pretrained(tmp_path / "saved")
    files = [tmp_path / name / "model.safetensors" for name in ("written", "saved")]
    assert files[0].read_bytes() == files[1].read_bytes()
    said = [json.loads((file.parent / "config.json").read_text())["quantization_config"] for file in files]
    assert said[0] == said[1] == described(scheme)


@every_scheme
def test_shards_and_the_files_beside(scheme: str, origin: Path, tmp_path: Path) -> None:
    before = digest(origin)
    quantize(origin, tmp_path / "written", scheme=scheme)
    assert digest(origin) == before
    assert digest(tmp_path / "written").keys() == before.keys()
    assert_same(tensors_of(tmp_path / "written"), expected_of(weights_of(CONFIG), scheme))
    index = json.loads((tmp_path / "written" / "model.safetensors.index.json").read_text())
    for file in sorted((tmp_path / "written").glob("*.safetensors")):
        assert {name for name, named in index["weight_map"].items() if named == file.name} == load_file(file).keys()
    tensors = tensors_of(tmp_path / "written")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    weight_of = {name: index["weight_map"][name] for name in tensors if name.startswith(f"{DOWN}.")}
    assert len(set(weight_of.values())) == 1, "a weight and its scale are in one file"


def test_config_json_gains_one_field_and_stays_as_it_is(origin: Path, tmp_path: Path) -> None:
    quantize(origin, tmp_path / "written", scheme="w8a8", ignore=["down_proj"])
    old, new = ((folder / "config.json").read_text() for folder in (origin, tmp_path / "written"))
    values = json.loads(new)
    assert next(iter(values)) == "quantization_config"
    said = values.pop("quantization_config")
    assert said == described("w8a8", ["lm_head", *(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))])
    assert values == json.loads(old)
    assert new.endswith(old[old.index("\n") :])


def test_an_empty_field_is_replaced(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "ordinary", CONFIG, weights_of(CONFIG))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    quantize(folder, tmp_path / "written", scheme="w8a16")
    assert json.loads((tmp_path / "written" / "config.json").read_text())["quantization_config"] == described("w8a16")


@every_scheme
def test_the_tiny_checkpoint(scheme: str, tmp_path: Path) -> None:
    """Its head is tied: there is none to keep."""
    quantize(tiny.path(), tmp_path / "written", scheme=scheme)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "written")
    assert model.optimizations.scheme == scheme
    plan = plan_quantize(tiny.path(), tmp_path / "other", scheme=scheme)
    assert (len(plan.quantised), plan.kept) == (7 * model.config.num_hidden_layers, ("lm_head",))
    assert plan.before == sum(tensor.nbytes for tensor in tensors_of(tiny.path()).values())
    assert plan.after == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "written").values())


@pytest.mark.parametrize(
    ("ignore", "kept"),
    [
        (["down_proj"], ("down_proj",)),
        (["lm_head"], ()),
        (["lm_head", "o_proj", "mlp"], ("o_proj", "mlp")),
        (["layers.1"], ("layers.1",)),
        ([DOWN], (DOWN,)),
        (["re:.*(q|k|v)_proj"], ("q_proj", "k_proj", "v_proj")),
        ([r"re:model\.layers\.0\.mlp"], ("layers.0.mlp",)),
    ],
)
def test_layers_to_keep(ignore: list[str], kept: tuple[str, ...], origin: Path, tmp_path: Path) -> None:
    quantize(origin, tmp_path / "written", scheme="w8a8", ignore=ignore)
    assert_same(tensors_of(tmp_path / "written"), expected_of(weights_of(CONFIG), "w8a8", kept))
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "written")
    found = quantization_of(model.config)
    assert found is not None
    assert all(found.covers(f"model.layers.0.{name}") is not any(part in f"model.layers.0.{name}" for part in kept)
               for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"))  # fmt: skip


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (["x_proj"], r"--ignore x_proj: no linear layer of this model has that name; they are model\.layers\.0\.self"),
        (["proj"], "--ignore proj: no linear layer"),
        (["down_proj", "layers.7"], r"--ignore layers\.7: no linear layer"),
        (["re:down_proj"], "--ignore re:down_proj: no linear layer"),
        (["re:*"], r"--ignore re:\*: no regular expression"),
        (["norm"], "--ignore norm: no linear layer"),
        (["k_proj"], r"--ignore k_proj: .*q_proj is quantised, and \S+k_proj is not: they are one product"),
        (["up_proj"], "--ignore up_proj: .*gate_proj is quantised, and .*up_proj is not"),
        (["model"], "--ignore model: no linear layer is left to be quantised"),
        (["self_attn", "mlp"], "--ignore self_attn mlp: no linear layer is left"),
    ],
)
def test_layers_that_cannot_be_kept(ignore: list[str], message: str, origin: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        quantize(origin, tmp_path / "written", scheme="w8a8", ignore=ignore)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "written").exists()


def test_another_scheme(origin: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="scheme='w4a16': there are w8a16 and w8a8"):
        quantize(origin, tmp_path / "written", scheme="w4a16")


@every_scheme
def test_what_is_quantised_already(scheme: str, origin: Path, tmp_path: Path) -> None:
    quantize(origin, tmp_path / "written", scheme=scheme)
    with pytest.raises(CheckpointError, match=rf"is quantised already \({scheme}\): load it as it is, or quantise the"):
        quantize(tmp_path / "written", tmp_path / "again", scheme="w8a8")
    assert not (tmp_path / "again").exists()


def test_what_is_merged(origin: Path, tmp_path: Path) -> None:
    merge_qkv(origin, tmp_path / "merged", tp_size=2)
    with pytest.raises(
        CheckpointError, match=rf"has merged q, k and v .*merge-qkv --unmerge --model-path .*{tmp_path}/merged-unm"
    ):
        quantize(tmp_path / "merged", tmp_path / "written", scheme="w8a8")
    # One that does not say for how many ranks it was merged, as the guide's does not:
    (tmp_path / "merged" / "config.json").write_bytes((origin / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"merge-qkv --unmerge --assume-tp N --model-path "):
        quantize(tmp_path / "merged", tmp_path / "written", scheme="w8a8")


@pytest.mark.skipif(IS_V4, reason="this transformers has no Qwen2Moe")
def test_a_mixture_of_experts(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"mixture of experts \(model_type='qwen2_moe'\), and experts are not c"):
        quantize(tiny_moe.path(), tmp_path / "written", scheme="w8a8")


def other_dtype(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, path)


FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "1 of 3 shards named by .* are missing"),
    (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor"),
    (other_dtype, "is stored as I8, which is quantised or no weight"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=["config", "shard", "index", "integers"])
def test_an_input_that_does_not_serve(spoil: Callable[[Path], Any], message: str, origin: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(origin, tmp_path / "ordinary"))
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        quantize(folder, tmp_path / "written", scheme="w8a8")
    assert not (tmp_path / "written").exists()


@every_scheme
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_without_an_integer(scheme: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_ranges, "CHUNK", 1000)
    weights = weights_of(CONFIG)
    weights[f"{DOWN}.weight"][5, 7] = value
    folder = write_folder(tmp_path / "ordinary", CONFIG, weights)
    message = (
        rf"{folder}/model\.safetensors: {DOWN}\.weight has a value in row 5 that is NaN or infinite.*--ignore {DOWN}"
    )
    with pytest.raises(CheckpointError, match=message):
        quantize(folder, tmp_path / "written", scheme=scheme)
    quantize(folder, tmp_path / "other", scheme=scheme, ignore=[DOWN])
    assert tensors_of(tmp_path / "other")[f"{DOWN}.weight"].shape == (8, 168)


def test_nothing_is_overwritten(origin: Path, tmp_path: Path) -> None:
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="has files in it"):
        quantize(origin, tmp_path / "written", scheme="w8a8")
    assert (tmp_path / "written" / "note").read_text() == "mine"
    for output in (origin, origin / "inside"):
        with pytest.raises(CheckpointError, match="output path"):
            quantize(origin, output, scheme="w8a8")


# ---- killed ----------------------------------------------------------------------------------------------------------
def test_killed_and_run_again(tmp_path: Path) -> None:
    config = config_of(4, 2, layers=1)
    origin = write_folder(tmp_path / "ordinary", config, weights_of(config), shards=2)
    with interrupted(0, Killed, for_good=True) as done:
        quantize(origin, tmp_path / "whole", scheme="w8a16")
    expected = digest(tmp_path / "whole")
    for at in range(1, len(done) + 1, 3):  # at every change: test_merging.py, of the same writer
        output = tmp_path / str(at)
        with pytest.raises(Killed), interrupted(at, Killed, for_good=True):
            quantize(origin, output, scheme="w8a16")
        if output.exists() and not (output / "config.json").exists():
            with pytest.raises(CheckpointError, match=r"has no config\.json"):
                Qwen2ForCausalLM.from_pretrained(output)
        if not (output / "config.json").exists() or (output / QUANTISING).exists():
            quantize(origin, output, scheme="w8a16")
        assert digest(output) == expected, f"killed at change {at}"


def interrupt(origin: Path, output: Path, scheme: str = "w8a8") -> None:
    with pytest.raises(Killed), interrupted(20, Killed, for_good=True):
        quantize(origin, output, scheme=scheme)
    assert (output / QUANTISING).exists()


def test_an_interrupted_folder_is_no_checkpoint(origin: Path, tmp_path: Path) -> None:
    interrupt(origin, tmp_path / "written")
    with pytest.raises(CheckpointError, match="qwen2-npu quantize was interrupted, or is under way: run the same"):
        Qwen2ForCausalLM.from_pretrained(tmp_path / "written")
    with pytest.raises(CheckpointError, match="has files in it"):
        merge_qkv(origin, tmp_path / "written")


@pytest.mark.parametrize("other", [{"scheme": "w8a16"}, {"scheme": "w8a8", "ignore": ["down_proj"]}])
def test_an_interrupted_run_of_other_options(other: dict[str, Any], origin: Path, tmp_path: Path) -> None:
    interrupt(origin, tmp_path / "written")
    with pytest.raises(CheckpointError, match="holds an interrupted run of another command"):
        quantize(origin, tmp_path / "written", **other)
    quantize(origin, tmp_path / "written", scheme="w8a8")


CHILD = """
import sys
from qwen2_npu.checkpoint import byte_ranges, quantizing
byte_ranges.CHUNK = 512
print("begin", flush=True)
quantizing.quantize(sys.argv[1], sys.argv[2], scheme="w8a16")
"""


@pytest.mark.slow
def test_real_kills(tmp_path: Path) -> None:
    config = config_of(64, 8, layers=4)
    origin = write_folder(tmp_path / "ordinary", config, weights_of(config), shards=5)
    quantize(origin, tmp_path / "expected", scheme="w8a16")
    chance, killed = random.Random(0), 0
    for attempt in range(4):
        output = tmp_path / str(attempt)
        with subprocess.Popen([sys.executable, "-c", CHILD, origin, output], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        killed += process.returncode != 0
        if not (output / "config.json").exists() or (output / QUANTISING).exists():
            quantize(origin, output, scheme="w8a16")
        assert digest(output) == digest(tmp_path / "expected")
    assert killed > 1


# ---- memory ----------------------------------------------------------------------------------------------------------
def quantize_into(folder: Path, output: Path, run: int) -> None:
    quantize(folder, output.with_name(f"{output.name}-{run}"), scheme="w8a16")


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own allocations at their peak, and the largest part of a weight that a tensor is made of."""
    monkeypatch.setattr(byte_ranges, "CHUNK", 2**14)
    largest: list[int] = []
    chunks = byte_ranges.chunks

    def watched(part: Any) -> Any:
        largest.append(part.size)
        return chunks(part)

    monkeypatch.setattr("qwen2_npu.checkpoint.quantizing.chunks", watched)
    peaks = []
    for number, intermediate in enumerate((1_000, 8_000)):
        config = config_of(28, 4, layers=1)
        config.intermediate_size = intermediate
        folder = write_folder(tmp_path / f"ordinary-{number}", config, weights_of(config))
        peaks.append(least_peak(partial(quantize_into, folder, tmp_path / f"written-{number}")))
    assert abs(peaks[1] - peaks[0]) < 2**16
    assert max(largest) <= 2**14
