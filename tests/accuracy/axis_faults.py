"""Negative controls of ``axes``: faults that no shape of the ladder shows, and the case of ``axes`` that shows each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from qwen2_npu.cache import FixedKVCache
from qwen2_npu.compat import IS_V4


@dataclass(frozen=True)
class AxisFault:
    """``patch`` puts the fault into a new model with all optimisations. ``batch`` and ``way`` show it."""

    name: str
    description: str
    patch: Callable[[Any], None]
    model: str = "eps_1e-5"
    batch: str = "ragged"
    way: str = "steps"
    hidden_from: tuple[str, str, str] | None = None
    """Model, batch and way that do not show it: why the axis is there. None where every case shows it."""


def _wider_window(by: int) -> Callable[[Any], None]:
    def patch(model: Any) -> None:
        """In prefill, the cache's masks and the masks of continuations."""
        model._window = model._masks.window = model._window + by
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.window = attention.window and attention.window + by

    return patch


def _one_phase_wider(phase: str) -> Callable[[Any], None]:
    def patch(model: Any) -> None:
        """One token too many is seen in one phase alone."""
        if phase == "prefill":
            for layer in model.model.layers:
                layer.self_attn.window = layer.self_attn.window and layer.self_attn.window + 1
        elif phase == "extend":
            model._masks.window += 1
        else:
            _allocate(model, sliding_window=model._window + 1)

    return patch


def _allocate(model: Any, **changes: Any) -> None:
    """Caches are those of another shape."""
    right = model.cache_shape

    def shape(*args: Any) -> Any:
        return replace(right(*args), **changes)

    model.cache_shape = shape


def _frequencies(change: Callable[[torch.Tensor, float], tuple[torch.Tensor, float]]) -> Callable[[Any], None]:
    def patch(model: Any) -> None:
        model.model.rotary.frequencies = change(*model.model.rotary.frequencies)

    return patch


def plain_frequencies(like: torch.Tensor, theta: float) -> torch.Tensor:
    """Those of rope type default."""
    return theta ** -(torch.arange(len(like), dtype=torch.float32) / len(like))


def _late_continuation(model: Any) -> None:
    """Several tokens after what the cache holds begin one position late."""
    right = model.model.rotary.forward
    phases: list[str] = []
    network = model.model.forward

    def forward(tokens: Any, phase: str, *args: Any) -> Any:
        phases[:] = [phase]
        return network(tokens, phase, *args)

    model.model.forward = forward
    model.model.rotary.forward = lambda position_ids, **kwargs: right(
        position_ids + int(phases == ["extend"]), **kwargs
    )


def _of_caches(method: str, change: Callable[..., Any]) -> Callable[[Any], None]:
    def patch(model: Any) -> None:
        """``change(right, argument)`` in place of the caches' method."""
        allocate = model.allocate_cache

        def allocated(*args: Any) -> FixedKVCache:
            found = allocate(*args)
            right = getattr(found, method)
            setattr(found, method, lambda argument: change(right, argument))
            return found

        model.allocate_cache = allocated

    return patch


def _crop_less(right: Any, tokens: int) -> None:
    """The last token that is cropped stays in its slot, and what follows is written behind it."""
    cache = right.__self__
    right(tokens)
    cache.lengths = [length + 1 for length in cache.lengths]
    cache.write_index.add_(1)
    cache._rebuild_masks()


def _epsilon(value: float) -> Callable[[Any], None]:
    def patch(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = value

    return patch


def rough_angles(model: Any) -> None:
    """The rotary angles are rounded to bfloat16 before their cosine and sine are taken."""
    rotary = model.model.rotary

    def prepare(dtype: torch.dtype, device: torch.device, *needed: int) -> None:
        frequencies, scaling = rotary.frequencies
        angles = torch.outer(torch.arange(rotary.positions, dtype=torch.float32), frequencies).bfloat16().float()
        rotary.cos, rotary.sin = (
            (torch.cat((half, half), dim=-1) * scaling).to(device, dtype) for half in (angles.cos(), angles.sin())
        )

    rotary.prepare = prepare


AXIS_FAULTS: tuple[AxisFault, ...] = (
    AxisFault(
        "epsilon_ignored",
        "the norms take 1e-6 whatever rms_norm_eps says",
        _epsilon(1e-6),
    ),
    AxisFault(
        "theta_ignored",
        "the rotary frequencies are those of rope_theta 1e6",
        _frequencies(lambda inv_freq, scaling: (plain_frequencies(inv_freq, 1e6), scaling)),
        model="eps_1e-2_theta_1e4",
        hidden_from=("eps_1e-5", "ragged", "steps"),
    ),
    AxisFault(
        "continuation_positions_late",
        "the positions of several new tokens begin one too late",
        _late_continuation,
        way="several_tokens",
        hidden_from=("eps_1e-5", "ragged", "steps"),
    ),
    AxisFault(
        "beams_stay",
        "rows keep their own cache when beams are reordered",
        _of_caches("reorder_cache", lambda right, order: None),
        batch="equally_padded",
        way="reorder",
        hidden_from=("eps_1e-5", "ragged", "steps"),
    ),
    AxisFault(
        "beams_inverted",
        "row order[i] becomes row i in place of row i row order[i]",
        _of_caches("reorder_cache", lambda right, order: right(torch.argsort(order, stable=True))),
        batch="equally_padded",
        way="reorder",
        hidden_from=("eps_1e-5", "ragged", "steps"),
    ),
)
if not IS_V4:
    AXIS_FAULTS += (
        *(
            AxisFault(
                f"window_{'wider' if by > 0 else 'narrower'}",
                f"sliding layers see {by:+} token",
                _wider_window(by),
                model="window",
                batch="one",
            )
            for by in (1, -1)
        ),
        *(
            AxisFault(
                f"window_wider_in_{phase}",
                f"sliding layers see one token too many in {phase}",
                _one_phase_wider(phase),
                model="window",
                way=way,
            )
            for phase, way in (("prefill", "steps"), ("extend", "several_tokens"), ("decode", "steps"))
        ),
        AxisFault(
            "yarn_factor_ignored",
            "the frequencies are not scaled",
            _frequencies(lambda inv_freq, scaling: (plain_frequencies(inv_freq, 1e4), scaling)),
            model="yarn",
        ),
        AxisFault(
            "attention_factor_ignored",
            "cos and sin are not scaled",
            _frequencies(lambda inv_freq, scaling: (inv_freq, 1.0)),
            model="yarn",
            hidden_from=("eps_1e-5", "ragged", "steps"),
        ),
        AxisFault(
            "crop_keeps_one",
            "a crop leaves one token too many",
            _of_caches("crop", _crop_less),
            batch="one",
            way="crop",
            hidden_from=("eps_1e-5", "ragged", "steps"),
        ),
    )
