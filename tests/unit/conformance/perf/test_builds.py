"""The models behind the rows, made on the device with random weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2_npu.checkpoint.sources import part_of
from qwen2_npu.checkpoint.weights import stock_shapes
from qwen2_npu.compat import IS_V4
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.perf import builds
from qwen2_npu.conformance.perf.builds import RandomWeights, Weights, check_mode, compile_stock, random_stock, size_of
from qwen2_npu.conformance.perf.protocol import measure
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.optimizations import EXPERTS, LADDER, ORIGINAL, QUANTIZED
from qwen2_npu.parallel.collectives import ALONE
from qwen2_npu.parallel.sharding import Shard
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


# ---- random weights in 8 bits ---------------------------------------------------------------------------------------
class Floats(TorchDispatchMode):
    """The shapes of all floating-point tensors that are made in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, list | tuple) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
        return found


PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_random_weights_are_made_in_8_bits_and_never_in_others(scheme: str) -> None:
    with Floats() as floats:
        model = Weights(SMALL).build(configuration(scheme), "cpu")
    assert model.optimizations.names() == (*LADDER, scheme)
    parameters = dict(model.named_parameters())
    quantised = {name: tensor for name, tensor in parameters.items() if tensor.dtype == torch.int8}
    assert {name.split(".")[-2] for name in quantised} == set(PRODUCTS)
    assert sum(tensor.numel() for tensor in quantised.values()) == SMALL.quantised
    scales = [parameters[f"{name}_scale"] for name in quantised]
    assert {tensor.dtype for tensor in scales} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in scales) == SMALL.channels
    size = sum(tensor.numel() * tensor.itemsize for tensor in parameters.values())
    assert size == 2 * SMALL.parameters - SMALL.saved_bytes(scheme, 2)
    for name, tensor in quantised.items():
        assert (int(tensor.min()), int(tensor.max())) == (-127, 127), name
        spread = (tensor.float() * parameters[f"{name}_scale"]).std()
        assert float(spread) == pytest.approx(model.config.initializer_range, rel=0.03)
    stock = {shape for name, shape in stock_shapes(SMALL.config()).items() if name.endswith("_proj.weight")}
    assert not floats.shapes & (stock | {tuple(tensor.shape) for tensor in quantised.values()})
    assert (SMALL.vocab, SMALL.hidden) in floats.shapes  # it does see what is made
    assert replace(measure(model, batch=2, input_tokens=16, decode_steps=3), warnings=()).faults() == []


@pytest.mark.parametrize("scheme", [None, *QUANTIZED])
def test_ranks_take_parts_of_the_same_random_numbers(scheme: str | None) -> None:
    config = SMALL.config(scheme=scheme)
    source = RandomWeights(config, torch.bfloat16, torch.device("cpu"))
    whole = dict(source.tensors())
    assert not torch.equal(*(whole[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "kv"))
    for rank in (0, 1):
        shard = Shard(rank, 2)
        for name, part in source.tensors(lambda name, shard=shard: shard.slice_of(name, config)):  # type: ignore[misc]
            assert torch.equal(part, part_of(whole[name], shard.slice_of(name, config))), name
            assert tuple(part.shape) == shard.shape_of(name, source.shapes()[name], config)


def test_which_steps_random_weights_have() -> None:
    assert Weights(SMALL).ladder == (ORIGINAL, *LADDER, *QUANTIZED)
    assert Weights(SMALL).usual == (ORIGINAL, LADDER[-1])
    assert Weights.of("57B-A14B").ladder == (ORIGINAL, *LADDER, *EXPERTS)
    assert Weights.of("57B-A14B").usual == (ORIGINAL, EXPERTS[-1])


@needs_mixtures
def test_a_mixture_of_experts_is_not_built_in_8_bits() -> None:
    with pytest.raises(UnsupportedError, match="w8a16: a mixture of experts is not computed in 8 bits"):
        Weights(MIXTURE).build(Configuration("mixture", 1, 1, "eager", "w8a16"), "cpu")


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
@pytest.mark.parametrize("step", ["original", "fixed_kv_cache", "fused_qkv", "ifa_tiling", "swiglu", *QUANTIZED])
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


def test_a_dense_model_of_a_mixtures_dimensions_is_not_that_mixture() -> None:
    config = SIZES["7B"].config()
    config.vocab_size = SIZES["57B-A14B"].vocab
    found = size_of(config, "downloaded")
    assert (found.name, found.experts) == ("downloaded", 0)


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
