"""What the ladder's shapes do not have: windows, rope scaling, other epsilons, and other ways to continue from a cache.

A case is a model (settings of its configuration), a batch and a way: prompt, then passes over forced tokens, with crops
and reorders of the cache between them. The stock model, its float64 self and this project's go the same way, and every
position is judged by the rules of ``noise``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint.sources import StateDictSource
from qwen2_npu.compat import CACHE_NAME, IS_V4, cache_of
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.compare import Comparison, KnownPath, compare_traces
from qwen2_npu.conformance.accuracy.configs import random_state_dict
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.accuracy.pair import PairWeights
from qwen2_npu.conformance.accuracy.stock import exact
from qwen2_npu.conformance.accuracy.teacher_forcing import Trace, position_ids_of, to_numpy
from qwen2_npu.optimizations import QUANTIZED
from tests.accuracy import quantised
from tests.unit.small import small_config

VOCABULARY = 256
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3,
    "rope_theta": 1e4,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "eps_1e-5": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "eps_1e-2_theta_1e4": {"rms_norm_eps": 1e-2, "rope_theta": 1e4},
}
if not IS_V4:  # 4.37.0 has neither
    MODELS |= {
        "window": {"rms_norm_eps": 1e-5, "rope_theta": 5e5} | WINDOW,
        "yarn": {"rms_norm_eps": 1e-5, "rope_parameters": YARN, "max_position_embeddings": 256},
    }
"""Name -> settings of the configuration."""

QUANTISED: dict[str, tuple[str, dict[str, Any]]] = {
    f"{scheme}_{name}": (scheme, settings)
    for scheme, names in (("w8a16", ("eps_1e-5", "window")), ("w8a8", ("eps_1e-5", "yarn")))
    for name, settings in MODELS.items()
    if name in names
}
"""The same with 8-bit weights -> their scheme, and settings."""

LONG_MODELS: dict[str, dict[str, Any]] = {"long": {"rope_theta": 1e6}}
if not IS_V4:
    LONG_MODELS["long_window"] = {"rope_theta": 1e6, **WINDOW, "sliding_window": 300}
"""The same for the long prompt."""

BATCHES: dict[str, tuple[tuple[int, ...], int]] = {
    "one": ((17,), 0),
    "ragged": ((12, 1, 17, 9), 0),
    "equally_padded": ((13,) * 4, 3),
    "alike_and_unsorted": ((9, 5, 9), 1),
}
"""Name -> tokens per row, and columns of padding beside that of the shorter rows."""


@dataclass(frozen=True)
class Crop:
    """The last so many tokens of every row are forgotten."""

    tokens: int


@dataclass(frozen=True)
class Reorder:
    """Row i becomes row ``i + by`` (mod rows) of before, but for the last, which is dropped: as beams are."""

    by: int

    def rows(self, count: int) -> list[int]:
        return [(row + self.by) % count if row < count - 1 else 0 for row in range(count)]


WAYS: dict[str, tuple[int | Crop | Reorder, ...]] = {
    "steps": (1,) * 6,
    "several_tokens": (4, 1, 3),
    "reorder": (1, Reorder(1), 1, 2, Reorder(1), 1),
}
if not IS_V4:  # its DynamicCache cannot
    WAYS["crop"] = (4, Crop(3), 1, 2, 1, Crop(1), 1)
"""Name -> what follows the prompt: passes of so many new tokens, and what is done to the cache between them."""

PRESETS: dict[str, Optimizations] = {
    "none": Optimizations.none(),
    "fixed_kv_cache": Optimizations.up_to("fixed_kv_cache"),
    "flash_attention": Optimizations.up_to("flash_attention"),
    "masks": Optimizations.up_to("swiglu"),
    "all": Optimizations.all(),
    "all_with_fused_infer_attention": Optimizations.all().replace(fused_infer_attention=True),
}
QUANTISED_PRESETS: dict[str, dict[str, Optimizations]] = {
    scheme: {
        f"{scheme}_all": Optimizations.up_to(scheme),
        f"{scheme}_masks": Optimizations.only("fixed_kv_cache").replace(**{scheme: True}),
        f"{scheme}_alone": Optimizations.only(scheme),
    }
    for scheme in QUANTIZED
}
"""Scheme -> the same of models that compute with 8-bit weights."""
DTYPES = ("float32", "bfloat16")

LONG, LONG_WAY = 1020, (1, 3)
"""Tokens of the long prompt, whose second half is judged on its own, and what follows it."""


def pair_of(model: str, dtype: str, device: str) -> ModelPair:
    """The stock model on that device, and its exact self, of random weights for that model."""
    return _pair(model, dtype, str(torch.empty(0, device=device).device))  # npu is npu:0


@cache
def _pair(model: str, dtype: str, device: str) -> ModelPair:
    scheme, settings = QUANTISED[model] if model in QUANTISED else ("", (MODELS | LONG_MODELS)[model])
    config = small_config(
        **{"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 2048} | settings
    )
    parsed = getattr(torch, dtype)
    state = random_state_dict(config, dtype=parsed)
    if scheme:
        return ModelPair.of(quantised.weights_of(model, config, state, scheme, parsed, device), device, 0)

    def build(optimizations: Optimizations) -> Any:
        made = Qwen2ForCausalLM.from_state_dict(config, state, dtype=parsed, device=device, optimizations=optimizations)
        return made.eval()

    return ModelPair.of(PairWeights(model, StateDictSource(config, state), parsed, build), device, 0)


def batch_of(name: str) -> Batch:
    """Random prompts of that shape."""
    lengths, padding = BATCHES[name]
    generator = torch.Generator().manual_seed(len(name))
    batch = Batch.of([torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths])
    columns = torch.zeros(len(lengths), padding, dtype=torch.int64)
    return Batch(*(torch.cat((columns, given), dim=1) for given in (batch.input_ids, batch.attention_mask)))


def long_batch() -> Batch:
    """One row of :data:`LONG` tokens."""
    return Batch.of(torch.randint(VOCABULARY, (1, LONG), generator=torch.Generator().manual_seed(0)).tolist())


@torch.no_grad()
def walk(model: Any, batch: Batch, way: tuple[int | Crop | Reorder, ...], *, positions: bool = True) -> Trace:
    """The logits of the prompt and of every pass of ``way``, whose tokens are random.

    Args:
        positions: whether position_ids are passed; without them, padding is counted.
    """
    rows, width = batch.input_ids.shape
    most = width + sum(action for action in way if isinstance(action, int))
    kept: Any = model.allocate_cache(rows, most) if isinstance(model, Qwen2ForCausalLM) else DynamicCache()
    generator = torch.Generator().manual_seed(1)
    mask, found, forced = batch.attention_mask, [], []

    def step(ids: torch.Tensor, mask: torch.Tensor) -> None:
        nonlocal kept
        given = {"input_ids": ids}
        if positions:
            given["position_ids"] = position_ids_of(mask)[:, -ids.shape[1] :]
        if not mask.all():  # the ladder passes one always
            given["attention_mask"] = mask
        there = {name: tensor.to(model.device) for name, tensor in given.items()}
        output = model(use_cache=True, **{CACHE_NAME: kept}, **there)
        kept = cache_of(output)
        found.append(to_numpy(output.logits))

    step(batch.input_ids, mask)
    for action in way:
        match action:
            case Crop(tokens):
                kept.crop(-tokens)
                mask = mask[:, :-tokens]
            case Reorder():
                order = torch.tensor(action.rows(rows))
                kept.reorder_cache(order.to(model.device))
                mask = mask[order]
            case tokens:
                ids = torch.randint(VOCABULARY, (rows, tokens), generator=generator)
                mask = torch.cat((mask, mask.new_ones(rows, tokens)), dim=1)
                step(ids, mask)
                forced.append(ids.numpy())
    return Trace(
        prefill_logits=found[0],
        decode_logits=np.concatenate(found[1:], axis=1),
        forced=np.concatenate(forced, axis=1),
        valid=batch.attention_mask.bool().numpy(),
    )


@cache
def _stock_traces(
    model: str, dtype: str, device: str, batch: str, way: str, rounded: bool
) -> tuple[Trace, Trace, dict[str, KnownPath]]:
    positions = BATCHES[batch][1] == 0
    with pair_of(model, dtype, device).stock(rounded) as (stock, reference):
        baseline = walk(stock, batch_of(batch), WAYS[way], positions=positions)
        with exact(reference):
            return baseline, walk(reference, batch_of(batch), WAYS[way], positions=positions), {}


def compare(ours: Any, model: str, dtype: str, batch: str, way: str) -> Comparison:
    """``ours``, a model of ``pair_of(model, dtype, …)``, through that batch on that way."""
    pair = pair_of(model, dtype, str(ours.device))
    baseline, reference, known = _stock_traces(model, dtype, str(ours.device), batch, way, pair.rounds(ours))
    trace = walk(ours, batch_of(batch), WAYS[way], positions=BATCHES[batch][1] == 0)
    return compare_traces(trace, baseline, reference, pair.dtype, known, pooled=bool(pair.scheme))


@cache
def _long_traces(model: str, dtype: str, device: str) -> tuple[Trace, Trace]:
    pair = pair_of(model, dtype, device)
    baseline = walk(pair.baseline, long_batch(), LONG_WAY)
    with exact(pair.reference):
        return baseline, walk(pair.reference, long_batch(), LONG_WAY)


def compare_long(ours: Any, model: str, dtype: str) -> tuple[Comparison, Comparison]:
    """The first half of the long prompt, and the second with what follows it."""
    traces = walk(ours, long_batch(), LONG_WAY), *_long_traces(model, dtype, str(ours.device))
    halves = []
    for part in (slice(LONG // 2), slice(LONG // 2, None)):
        cut = [
            replace(trace, prefill_logits=trace.prefill_logits[:, part], valid=trace.valid[:, part]) for trace in traces
        ]
        halves.append(compare_traces(*cut, getattr(torch, dtype)))
    return halves[0], halves[1]
