"""The models behind the rows, made on the device with random weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu.compat import IS_V4
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.perf import builds
from qwen2_npu.conformance.perf.builds import RandomWeights, Weights, check_mode, compile_stock, random_stock, size_of
from qwen2_npu.conformance.perf.protocol import measure
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.parallel.collectives import ALONE
from tests.unit.mixture import needs_mixtures
from tests.unit.small import small_config, small_stock

SMALL = Size("small", 256, 96, 2, 4, 2, 64, 199, tied=True)


def configuration(step: str, mode: Any = "eager") -> Configuration:
    return Configuration("small", 1, 1, mode, step)


@pytest.mark.parametrize("step", ["original", "fixed_kv_cache", "swiglu"])
def test_a_step_is_what_its_name_says(step: str) -> None:
    model = Weights(SMALL).build(configuration(step), "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in model.parameters()) == SMALL.parameters
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    if step == "original":
        assert type(model).__module__.startswith("transformers.")
    else:
        assert model.optimizations.names()[-1] == step


def test_random_weights_are_made_on_their_device_one_at_a_time() -> None:
    source = RandomWeights(small_config(tie_word_embeddings=True), torch.bfloat16, torch.device("meta"))
    for name, tensor in source.tensors():
        assert tensor.device.type == "meta"  # no byte was made anywhere else
        assert tuple(tensor.shape) == source.shapes()[name]
    assert "lm_head.weight" not in source.shapes()


def test_graph_rows_are_compiled() -> None:
    assert set(Weights(SMALL).build(configuration("swiglu", "graph"), "cpu").compiled_steps) == {"prefill", "decode"}
    stock = Weights(SMALL).build(configuration("original", "graph"), "cpu")
    assert hasattr(stock.forward, "_torchdynamo_orig_callable")


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("torchair", "needs torch_npu|compiles for NPUs, and the device is cpu, whose modes are eager, inductor"),
        ("npugraph_ex", "the cache of original has another one at every step"),
    ],
)
def test_the_stock_model_is_compiled_by_what_was_asked_for_or_not_at_all(mode: str, reason: str) -> None:
    model = random_stock(small_config(), torch.bfloat16, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=reason):
        compile_stock(model, mode)
    assert "forward" not in vars(model)


def test_inductor_compiles_the_stock_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda forward, **how: asked.append(how["backend"]) or forward)
    compile_stock(random_stock(small_config(), torch.bfloat16, torch.device("cpu")), "inductor")
    assert asked == ["inductor"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch, "npu"), reason="torch_npu is not installed")
@pytest.mark.parametrize("step", ["original", "fixed_kv_cache", "fused_qkv", "ifa_tiling", "swiglu"])
def test_graph_rows_are_measured_through_torchair(step: str) -> None:
    model = Weights(SMALL).build(configuration(step, "graph"), "npu")
    found = measure(model, batch=2, input_tokens=16, decode_steps=3)
    assert replace(found, warnings=()).faults() == []
    assert len(found.wall_ms) == 4


def test_stock_rotary_frequencies_stay_in_float32() -> None:
    model = random_stock(small_config(), torch.bfloat16, torch.device("cpu"))
    frequencies = {buffer.dtype for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    assert frequencies == {torch.float32}


def test_a_checkpoint_keeps_its_weights_and_its_published_name() -> None:
    weights = Weights.of_checkpoint(tiny.path())
    assert weights.description == Path(tiny.path()).name
    model = weights.build(configuration("swiglu"), "cpu")
    assert model.dtype == torch.bfloat16
    assert Weights.of("7B").description == "random"


def test_a_checkpoint_that_does_not_fit_is_named_before_any_model_meets_it(tmp_path: Path) -> None:
    shutil.copytree(tiny.path(), tmp_path / "bad")
    (file,) = (tmp_path / "bad").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        Weights.of_checkpoint(tmp_path / "bad")


PUBLISHED = [
    pytest.param(name, marks=needs_mixtures if size.experts else ()) for name, size in SIZES.items() if size.shards == 1
]
MIXTURE = Size(
    "mixture", 64, 96, 1, 4, 2, 16, 199, tied=False, experts=8, per_token=3, expert_columns=32, shared_columns=48
)


@needs_mixtures
@pytest.mark.parametrize("step", ["original", "swiglu", "fused_moe"])
def test_a_mixture_of_experts_is_built_and_measured(step: str) -> None:
    model = Weights(MIXTURE).build(Configuration("mixture", 1, 2, "eager", step), "cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) == MIXTURE.parameters
    assert size_of(model.config, "mixture") == MIXTURE
    assert replace(measure(model, batch=2, input_tokens=16, decode_steps=3), warnings=()).faults() == []


@needs_mixtures
def test_a_mixture_in_graph_mode_needs_its_step_before_a_model_is_built() -> None:
    with pytest.raises(UnsupportedError, match="needs the fused_moe step"):
        check_mode("inductor", torch.device("cpu"), "swiglu", MIXTURE.config())
    check_mode("inductor", torch.device("cpu"), "fused_moe", MIXTURE.config())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_is_recognised(name: str) -> None:
    assert size_of(SIZES[name].config(), "downloaded") is SIZES[name]


@pytest.mark.skipif(IS_V4, reason="transformers 4.37.0 puts one of the two in the place of the other: refused")
def test_a_part_of_the_stock_model_has_the_head_that_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where config.json calls it tied to an embedding that it differs from."""
    stock = small_stock(small_config(num_hidden_layers=1))
    stock.save_pretrained(tmp_path, safe_serialization=True)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    monkeypatch.setattr(builds, "stock_sharded", lambda model, ranks: model)
    weights = Weights.of_checkpoint(tmp_path)
    assert not weights.size.tied
    found = weights._stock_part(torch.device("cpu"), torch.float32, ALONE).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in stock.state_dict().items())
