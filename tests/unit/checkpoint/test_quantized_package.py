"""Checkpoints with 8-bit weights that the package compressed-tensors wrote are read here, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from tests.unit.checkpoint.merges import same_bits
from tests.unit.checkpoint.quantised_folders import (
    SCHEMES,
    in_float64,
    quantised_config,
    quantised_weights,
    write_quantised,
)
from tests.unit.small import small_stock

pytest.importorskip("compressed_tensors")

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("quantised")
    return {scheme: write_quantised(path / scheme, scheme, shards=3) for scheme in SCHEMES}


def by_package(folder: Path, scheme: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A folder as llm-compressor writes it, what is in its modules then, and the same dequantised by the package."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model: Any = small_stock(dtype=torch.bfloat16)
    weights_alone = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}
    groups = {"W8A8": ["Linear"]} if scheme == "w8a8" else weights_alone
    kept = ["lm_head", "model.layers.1.mlp.down_proj"]
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=kept))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            low, high = module.weight.amin(1, keepdim=True), module.weight.amax(1, keepdim=True)
            module.weight_scale.data.copy_(calculate_qparams(low, high, module.quantization_scheme.weights)[0])
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressor.decompress_model(model)
    return stored, dict(model.state_dict())


def dequantised_by_package(folder: Path) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization.utils import is_module_quantized

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for module in model.modules():
        if is_module_quantized(module):
            decompress_module(module)
    return dict(model.state_dict())


@every_scheme
def test_a_folder_that_the_package_wrote(scheme: str, tmp_path: Path) -> None:
    stored, dequantised = by_package(tmp_path / "theirs", scheme)
    found = load_file(tmp_path / "theirs" / "model.safetensors")
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "theirs")
    assert model.optimizations.scheme == scheme
    assert model.model.layers[1].mlp.down_proj.weight.dtype == torch.bfloat16
    assert {name for name in found if "weight_scale" in name} == {n for n in stored if "weight_scale" in n}
    plain = Qwen2ForCausalLM.from_pretrained(tmp_path / "theirs", optimizations=Optimizations.none())
    for name, tensor in plain.stock_state_dict().items():
        assert same_bits(tensor, dequantised[name]), name
    model.save_pretrained(tmp_path / "ours")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()


@every_scheme
def test_the_package_reads_what_is_written_here(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    Qwen2ForCausalLM.from_pretrained(folders[scheme]).save_pretrained(tmp_path)
    dequantised = dequantised_by_package(tmp_path)
    expected = in_float64(quantised_weights(quantised_config(scheme)))
    for name, tensor in expected.items():
        assert same_bits(dequantised[name], tensor.to(torch.bfloat16)), name


@every_scheme
def test_the_stock_model_s_configuration_and_tensors(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers makes an object of its own of quantization_config, and writes it as one."""
    stock: Any = AutoModelForCausalLM.from_pretrained(folders[scheme], dtype="auto")
    assert not isinstance(stock.config.quantization_config, dict)
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock.state_dict())
    assert model.optimizations.scheme == scheme
    model.save_pretrained(tmp_path)
    again = Qwen2ForCausalLM.from_pretrained(tmp_path).stock_state_dict()
    expected = quantised_weights(quantised_config(scheme))
    assert all(same_bits(tensor, expected[name]) for name, tensor in again.items())
