"""The weights that the accuracy suite runs on, built once per (weights, dtype) of a session."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from qwen2_npu.checkpoint.sources import open_checkpoint
from qwen2_npu.compat import expert_count
from qwen2_npu.conformance.accuracy.configs import SHAPES
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.pair import Pair, weights_of_checkpoint
from qwen2_npu.conformance.accuracy.streamed_pair import ASKED_FOR, StreamedPair, pair_of_checkpoint, why_streamed

TINY, CHECKPOINT = "tiny", "checkpoint"
MIXTURE = "qwen2-57b-a14b"
"""The shape that is a mixture of experts; with transformers 4.37.0 there is none."""


def weights_of(config: pytest.Config) -> tuple[str, ...]:
    """What there is to test: the checkpoint asked for, else the tiny one and all small shapes with random weights."""
    return (CHECKPOINT,) if config.option.model_path else (TINY, *SHAPES)


def is_mixture(config: pytest.Config, weights: str) -> bool:
    """Whether one entry of :func:`weights_of` is a mixture of experts."""
    if weights != CHECKPOINT:
        return weights == MIXTURE
    try:
        found = open_checkpoint(config.option.model_path, assume_tp=config.option.assume_tp).config
    except (ValueError, OSError):  # the tests say so
        return False
    return expert_count(found) > 0


def dtypes_of(config: pytest.Config) -> tuple[str, ...]:
    return (config.option.dtype,) if config.option.dtype else ("float32", "bfloat16", "float16")


def pair_of(config: pytest.Config, weights: str, dtype: str) -> Pair:
    """The pair for one entry of :func:`weights_of`."""
    option = config.option
    path = str(option.model_path) if weights == CHECKPOINT else None
    return _pair(weights, path, dtype, option.device, option.decode_steps, option.stream, option.assume_tp)


def streamed(config: pytest.Config, dtype: str) -> str:
    """Why the stock model goes layer by layer; empty where it is whole, or cannot be read at all."""
    option = config.option
    if option.stream is not None or option.model_path is None:
        return ASKED_FOR if option.stream else ""
    try:
        weights = weights_of_checkpoint(
            option.model_path,
            dtype=dtype,
            device=option.device,
            decode_steps=option.decode_steps,
            assume_tp=option.assume_tp,
        )
    except (ValueError, OSError):  # the tests say so
        return ""
    return why_streamed(weights, option.device)


@cache
def _pair(
    weights: str,
    path: str | None,
    dtype: str,
    device: str,
    decode_steps: int,
    stream: bool | None,
    assume_tp: int | None,
) -> Pair:
    if weights in SHAPES:
        kind = StreamedPair if stream else ModelPair
        return kind.of_shape(weights, dtype=getattr(torch, dtype), device=device, decode_steps=decode_steps)
    return pair_of_checkpoint(
        path, dtype=dtype, device=device, decode_steps=decode_steps, stream=stream, assume_tp=assume_tp
    )
