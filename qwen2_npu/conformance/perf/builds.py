"""The models behind the rows: any step of the ladder, any size, with random weights made on the device or real ones."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen2_npu import graph
from qwen2_npu.checkpoint import weights
from qwen2_npu.checkpoint.quantization import quantization_of
from qwen2_npu.checkpoint.sources import open_checkpoint, part_of, read_config, whole
from qwen2_npu.compat import expert_count
from qwen2_npu.conformance.accuracy.stock import stock_class, stock_from_pretrained, uninitialised, with_eager_attention
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.graph import GraphOptions, compile_model, npu
from qwen2_npu.models.quantized import UNIFORM_STD
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM
from qwen2_npu.optimizations import ORIGINAL, QUANTIZED, Optimizations
from qwen2_npu.parallel.collectives import Ranks, current
from qwen2_npu.parallel.sharding import OF_SCALE, Cutting
from qwen2_npu.parallel.stock import filled, hollow, stock_sharded

if TYPE_CHECKING:
    from transformers import Qwen2Config


def graph_compiler(device: torch.device) -> str:
    """The mode that graph rows are compiled with on ``device``."""
    return "torchair" if device.type == "npu" else "inductor"


def check_mode(mode: str, device: torch.device, step: str, config: Any = None) -> None:
    """Refuse a mode before a model is built for it.

    Raises:
        UnsupportedError: ``step``, ``device`` or this machine lacks it.
    """
    if mode == "npugraph_ex" and step == ORIGINAL:
        raise UnsupportedError(
            f"mode={mode!r} captures a graph per shape, and the cache of {ORIGINAL} has another one at every step: use "
            "torchair for it, or leave it out"
        )
    graph.check_mode(mode, device, None if step == ORIGINAL else Optimizations.up_to(step), config)


class RandomWeights:
    """Normally distributed weights made on ``device``, one tensor at a time: no copy on the host.

    A ``checkpoint`` source. Latency does not depend on the values, which are those of an initialised model. Where the
    configuration says that a weight is 8-bit integers, those are made, uniform in -127 to 127, and their scales.
    """

    def __init__(self, config: Qwen2Config, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self._shapes = weights.stock_shapes(config)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def stored_dtype(self) -> torch.dtype:
        return self.dtype

    def tensors(self, cut: Cutting = whole) -> Iterator[tuple[str, torch.Tensor]]:
        std = self.config.initializer_range
        for name, shape in self._shapes.items():
            integers = name + OF_SCALE in self._shapes
            tensor = torch.empty(shape, dtype=torch.int8 if integers else self.dtype, device=self.device)
            # A tensor is the same on all ranks, whatever part of it they take.
            seed = zlib.crc32(name.encode())
            generator = None if tensor.is_meta else torch.Generator(self.device).manual_seed(seed)
            if "norm" in name:
                tensor.fill_(1.0)
            elif name.endswith(OF_SCALE):
                tensor.fill_(std / UNIFORM_STD)
            elif integers:
                tensor.random_(-127, 128, generator=generator)
            else:
                tensor.normal_(std=std, generator=generator)
            yield name, part_of(tensor, cut(name))


@dataclass(frozen=True)
class Weights:
    """Where a model's weights come from.

    Args:
        size: published numbers, for random weights.
        path: a checkpoint folder, for real ones; its size is read from it.
        assume_tp: for how many ranks it was merged, where it does not record that.
    """

    size: Size
    path: Path | None = None
    assume_tp: int | None = None

    @classmethod
    def of(cls, name: str, path: Path | None = None, assume_tp: int | None = None) -> Weights:
        """Of the folder ``path``; without one, random ones of the size ``name``."""
        return cls(SIZES[name]) if path is None else cls.of_checkpoint(path, assume_tp=assume_tp)

    @classmethod
    def of_checkpoint(cls, path: Path, *, assume_tp: int | None = None) -> Weights:
        """Raises:
        CheckpointError: what is wrong with the folder, found before any model meets it.
        """
        source = open_checkpoint(path, assume_tp=assume_tp)
        weights.skeleton(lambda: Qwen2ForCausalLM.of_kind(source.config)(source.config), source)
        return cls(size_of(source.config, path.name), path, assume_tp)

    @property
    def description(self) -> str:
        """ "random", or the checkpoint's folder: part of what is recorded."""
        return "random" if self.path is None else self.path.name

    @property
    def ladder(self) -> tuple[str, ...]:
        """The steps that can be measured: those of 8 bits come last, and of stored integers the stock model is none."""
        stored = None if self.path is None else quantization_of(self.config())
        first = self.size.ladder if stored else (ORIGINAL, *self.size.ladder)
        schemes = QUANTIZED[: QUANTIZED.index(stored.scheme) + 1] if stored else () if self.path else QUANTIZED
        return first if self.size.experts else (*first, *schemes)

    @property
    def usual(self) -> tuple[str, ...]:
        """The steps that are measured where none are named: the stock model, and the last one made for the weights."""
        ladder = self.ladder
        return (ORIGINAL, self.size.ladder[-1]) if ladder[0] == ORIGINAL else ladder[-1:]

    def config(self) -> Qwen2Config:
        return self.size.config() if self.path is None else read_config(self.path)

    def build(self, configuration: Configuration, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        """The model of ``configuration``, on ``device``, compiled for graph rows; of several ranks, this one's part.

        Raises:
            UnsupportedError: a mode that this device lacks, a model that the ranks cannot share, or other ranks than
                the configuration's cards.
        """
        target = torch.device(device)
        ranks = current(configuration.cards, None, target)
        if configuration.step == ORIGINAL:
            model = self._stock(target, dtype) if ranks.size == 1 else self._stock_part(target, dtype, ranks)
            return model if configuration.mode == "eager" else compile_stock(model, graph_compiler(target))
        optimizations = Optimizations.up_to(configuration.step)
        if self.path is not None:
            parts: Any = {"tp_size": ranks.size, "assume_tp": self.assume_tp}
            ours = Qwen2ForCausalLM.from_pretrained(
                self.path, dtype=dtype, device=target, optimizations=optimizations, **parts
            )
        else:
            config = self.size.config(scheme=optimizations.scheme)
            ours = weights.build(
                lambda: Qwen2ForCausalLM.of_kind(config)(config, optimizations, ranks),
                RandomWeights(config, dtype, target),
                dtype=dtype,
                device=target,
            )
        return compile_model(ours, "eager" if configuration.mode == "eager" else graph_compiler(target))

    def _stock(self, device: torch.device, dtype: torch.dtype) -> Any:
        if self.path is not None:
            return stock_from_pretrained(self.path, dtype=dtype, device=device, assume_tp=self.assume_tp)
        return random_stock(self.config(), dtype, device)

    def _stock_part(self, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> Any:
        """What this rank computes of the stock model. No card and no host could hold it whole, once per rank."""
        stored = None if self.path is None else open_checkpoint(self.path, assume_tp=self.assume_tp)
        source = stored or RandomWeights(self.config(), dtype, device)
        model = hollow(uninitialised(with_eager_attention(source.config), dtype), dtype, device)
        return filled(stock_sharded(model, ranks), source, ranks).eval().requires_grad_(False)


def random_stock(config: Qwen2Config, dtype: torch.dtype, device: torch.device, attention: str | None = "eager") -> Any:
    """The stock model as transformers initialises it, made on ``device``.

    Args:
        attention: transformers' name of the attention implementation; None for its default.
    """
    config = type(config).from_dict(config.to_dict())
    if attention is not None:
        config._attn_implementation = attention
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # model.to(dtype) would round the rotary frequencies, too
    try:
        with device:
            model = stock_class(config)(config)
    finally:
        torch.set_default_dtype(previous)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def compile_stock(model: Any, mode: str) -> Any:
    """The stock model's forward pass, compiled as the guide compiles it: whole, with a growing cache, so dynamic.

    Args:
        mode: what compiles it; one of compile_model's, "eager" aside.

    Raises:
        UnsupportedError: a mode that the stock model, or its device, lacks.
    """
    check_mode(mode, model.device, ORIGINAL)
    backend: Any = mode
    if mode == "torchair":
        import torch_npu  # noqa: F401 - puts torchair on the path
        import torchair

        options = GraphOptions(dynamic=True, frozen_parameter=True, tiling_schedule_optimize=False, cache_dir=None)
        backend = torchair.get_npu_backend(compiler_config=npu.compiler_config(options))
    model.forward = torch.compile(model.forward, backend=backend, dynamic=True, fullgraph=True)
    return model


def size_of(config: Any, name: str) -> Size:
    """The numbers of any Qwen2 configuration: under its published name where it has one, else under ``name``."""
    found: dict[str, Any] = {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "vocab": config.vocab_size,
        "tied": bool(config.tie_word_embeddings),
    }
    if experts := expert_count(config):
        found |= {"experts": experts, "per_token": config.num_experts_per_tok}
        found |= {"expert_columns": config.moe_intermediate_size}
        found |= {"shared_columns": config.shared_expert_intermediate_size}
    for size in SIZES.values():
        if all(getattr(size, field) == found.get(field, 0) for field in ("experts", *found)):
            return size
    return Size(name=name, **found)
