"""Weights in 8 bits for the accuracy suite: the tiny checkpoint quantised on the fly, and random ones of each shape."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint import quantized
from qwen2_npu.checkpoint.quantization import FIELD, described, quantization_of
from qwen2_npu.checkpoint.quantizing import quantize
from qwen2_npu.checkpoint.sources import StateDictSource
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.configs import random_state_dict, small_config
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.pair import DECODE_STEPS, Pair, PairWeights
from qwen2_npu.conformance.accuracy.quantised import as_meant
from qwen2_npu.conformance.accuracy.streamed_pair import StreamedPair, pair_of_checkpoint
from qwen2_npu.optimizations import QUANTIZED
from tests.accuracy.pairs import TINY

DTYPES = {"w8a16": ("float32", "bfloat16", "float16"), "w8a8": ("bfloat16", "float16")}
"""Scheme -> the dtypes that it is compared in."""

PRESETS: dict[str, dict[str, Optimizations]] = {
    scheme: {
        f"up_to_{scheme}": Optimizations.up_to(scheme),
        f"only_{scheme}": Optimizations.only(scheme),
        f"{scheme}_up_to_fused_qkv": Optimizations.up_to("fused_qkv").replace(**{scheme: True}),
        f"{scheme}_with_fused_infer_attention": Optimizations.up_to(scheme).replace(fused_infer_attention=True),
        "none": Optimizations.none(),
        "all": Optimizations.all(),
    }
    for scheme in QUANTIZED
}
PRESETS["w8a8"] |= {
    "w8a8_with_separate_norm_quant": Optimizations.up_to("w8a8").replace(separate_norm_quant=True),
    "up_to_w8a16": Optimizations.up_to("w8a16"),
}
"""Scheme of a checkpoint -> name -> switches. Without those of 8-bit weights it is dequantised while it is read."""


@cache
def folder(scheme: str, ignore: tuple[str, ...] = ()) -> Path:
    """The tiny checkpoint, quantised; gone when the process ends."""
    scratch = Path(tempfile.mkdtemp(prefix="quantised-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    quantize(tiny.path(), scratch / scheme, scheme=scheme, ignore=ignore)
    return scratch / scheme


def in_8_bits(config: Any, state: Mapping[str, torch.Tensor], scheme: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The same weights as a checkpoint in 8 bits has them: configuration and tensors."""
    config = copy.deepcopy(config)
    setattr(config, FIELD, described(scheme))
    found = quantization_of(config)
    assert found is not None
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        tensors[name] = tensor
        if name.endswith(".weight") and found.covers(name.removesuffix(".weight")):
            scale = (tensor.double().abs().amax(dim=1, keepdim=True) / 127).to(tensor.dtype)
            tensors[name] = (tensor.double() / scale.double()).round().clamp(-127, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale
    return config, tensors


def weights_of(
    name: str,
    config: Any,
    state: Mapping[str, torch.Tensor],
    scheme: str,
    dtype: torch.dtype,
    device: str,
    ranks: int = 1,
) -> PairWeights:
    """Weights in floating point, put into 8 bits, and how this project's model is made of them.

    Args:
        ranks: how many the stock side rounds activations as.
    """
    config, tensors = in_8_bits(config, state, scheme)
    meant, scheme, rounding = as_meant(quantized.present(StateDictSource(config, tensors)), dtype, ranks)

    def build(optimizations: Optimizations) -> Any:
        made = Qwen2ForCausalLM.from_state_dict(
            config, tensors, dtype=dtype, device=device, optimizations=optimizations
        )
        return made.eval()

    return PairWeights(name, meant, dtype, build, scheme=scheme, rounding=rounding, ranks=ranks)


@cache
def pair_of(
    weights: str, scheme: str, dtype: str, device: str = "cpu", stream: bool = False, decode_steps: int = DECODE_STEPS
) -> Pair:
    """The tiny checkpoint or a small shape of the family, in 8 bits."""
    if weights == TINY:
        return pair_of_checkpoint(folder(scheme), dtype=dtype, device=device, decode_steps=decode_steps, stream=stream)
    parsed = getattr(torch, dtype)
    config = small_config(weights)
    given = weights_of(f"random {weights}", config, random_state_dict(config, dtype=parsed), scheme, parsed, device)
    return (StreamedPair if stream else ModelPair).of(given, device, decode_steps)
