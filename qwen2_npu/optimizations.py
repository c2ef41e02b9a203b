"""The optimisation ladder as data: every row of the guide's tables is a named switch.

``original`` is not a switch: it is the stock transformers model, untouched. ``Optimizations.none()`` is this project's
model with every switch off, which computes the same with the same operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from qwen2_npu.errors import UnsupportedError

ORIGINAL = "original"
"""The row that is no switch: transformers' own model."""

LADDER: tuple[str, ...] = (
    "fixed_kv_cache",
    "flash_attention",
    "add_rms_norm",
    "last_token_logits",
    "fused_qkv",
    "ifa_tiling",
    "fused_gate_up",
    "swiglu",
    "last_layer",
    "one_rotary",
    "kv_scatter",
)
"""The steps in order. Up to ``ifa_tiling`` they are the guide's rows; the rest goes beyond it."""

PARALLEL: tuple[str, ...] = ("mm_all_reduce",)
"""Steps of a model on several cards alone, after those of the ladder: not in ``all()``."""

EXPERTS: tuple[str, ...] = ("fused_moe",)
"""Steps of a mixture of experts alone, after those of the ladder. In ``all()``; a dense model has nothing to switch."""

QUANTIZED: tuple[str, str] = ("w8a16", "w8a8")
"""Steps of a checkpoint with 8-bit weights alone, of which one can be on: not in ``all()``, but the default for such a
checkpoint (:meth:`Optimizations.for_model`). With both off its weights are dequantised while they are read."""

VARIANTS: tuple[str, ...] = ("fused_infer_attention",)
"""Switches that replace an operator by another of the same meaning: no step of the ladder, so not in ``all()``."""

QUANTIZED_VARIANTS: tuple[str, ...] = ("separate_norm_quant",)
"""The same for models with 8-bit weights alone."""

REQUIRES: dict[str, tuple[str, ...]] = {
    # The flash operators read the cache as one BSND tensor per layer, updated in place.
    "flash_attention": ("fixed_kv_cache",),
    # actual_seq_lengths is an argument of the incremental flash attention operator.
    "ifa_tiling": ("flash_attention",),
    "fused_infer_attention": ("flash_attention",),
    # npu_swiglu takes gate and up as one tensor: without the fused product they would be copied together first.
    "swiglu": ("fused_gate_up",),
    # It computes the positions alone whose logits are kept, against keys and values of all of them.
    "last_layer": ("flash_attention", "last_token_logits"),
    # It turns the heads of q, k and v where one product left them.
    "one_rotary": ("flash_attention", "fused_qkv"),
    # Its cache of blocks is the BSND cache of the fused operators.
    "kv_scatter": ("flash_attention",),
    # Between the two products of the experts stands npu_swiglu.
    "fused_moe": ("swiglu",),
    # Its product and all-reduce are one operator in the prefill of the fused operators.
    "mm_all_reduce": ("flash_attention",),
    # What it replaces is one operator of this step's norms.
    "separate_norm_quant": ("add_rms_norm", "w8a8"),
}
"""Switch -> switches it cannot do without."""

ALTERNATIVES: tuple[tuple[str, str], ...] = (
    QUANTIZED,
    # The fused operator is used here for weights of floating-point numbers alone.
    *((step, scheme) for step in PARALLEL for scheme in QUANTIZED),
)
"""Pairs of switches of which one can be on."""

DESCRIPTIONS: dict[str, str] = {
    "fixed_kv_cache": "KV cache allocated once, updated in place (scatter_update_)",
    "flash_attention": "prompt / incremental flash attention in BSND, cos/sin once per step, fused RoPE",
    "add_rms_norm": "residual add and RMSNorm in one operator",
    "last_token_logits": "prefill computes lm_head on the last position only; next_tokens=0",
    "fused_qkv": "one matmul for q, k and v",
    "ifa_tiling": "incremental attention over the live tokens only (actual_seq_lengths)",
    "fused_gate_up": "one matmul for gate and up",
    "swiglu": "SiLU(gate)·up in one operator",
    "last_layer": "prefill computes the last layer, but for its k and v, on the kept positions only",
    "one_rotary": "decode: one rotary operator over the heads of q, k and v as one tensor, before they are split",
    "kv_scatter": "decode: one operator writes k and v; activations are (B, H), so that products are of two dimensions",
    "fused_moe": "mixture of experts: routing, grouped products and the sum over experts as npu:: operators",
    "mm_all_reduce": "prefill on several cards: o_proj and down_proj with their all-reduce in one operator",
    "w8a16": "8-bit weights, multiplied with the activations as they are (npu_weight_quant_batchmatmul)",
    "w8a8": "8-bit weights and activations quantised per token (npu_quant_matmul)",
    "fused_infer_attention": "npu_fused_infer_attention_score in place of the two flash attention operators",
    "separate_norm_quant": "npu_add_rms_norm and npu_dynamic_quant in place of npu_add_rms_norm_dynamic_quant",
}


Phase = Literal["prefill", "decode"]
"""What a step of generation computes: the whole prompt, or one token per row."""

PHASES: tuple[Phase, ...] = ("prefill", "decode")

MODES: tuple[str, ...] = ("eager", "torchair", "inductor", "npugraph_ex")
"""How a model can be run: modes of ``compile_model``."""

MODES_OF: dict[str, tuple[str, ...]] = {
    "cpu": ("eager", "inductor"),
    "cuda": ("eager", "inductor"),
    "npu": ("eager", "torchair", "npugraph_ex"),
}
"""Type of device -> the modes that it takes; any other type takes eager alone."""


@dataclass(frozen=True)
class Optimizations:
    """Which steps are on. Impossible combinations raise ``ValueError`` on construction.

    See :data:`DESCRIPTIONS` for what each switch changes and :data:`REQUIRES` for what depends on what.
    """

    fixed_kv_cache: bool = False
    flash_attention: bool = False
    add_rms_norm: bool = False
    last_token_logits: bool = False
    fused_qkv: bool = False
    ifa_tiling: bool = False
    fused_gate_up: bool = False
    swiglu: bool = False
    last_layer: bool = False
    one_rotary: bool = False
    kv_scatter: bool = False
    fused_moe: bool = False
    mm_all_reduce: bool = False
    w8a16: bool = False
    w8a8: bool = False
    fused_infer_attention: bool = False
    separate_norm_quant: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), bool):
                raise ValueError(f"{field.name}={getattr(self, field.name)!r} must be True or False")
        for name in self.names():
            for needed in REQUIRES.get(name, ()):
                if not getattr(self, needed):
                    raise ValueError(
                        f"{name} needs {needed}, which is off; switch it on too, or use "
                        f"Optimizations.only({name!r}), which adds what it needs"
                    )

        for pair in ALTERNATIVES:
            if all(getattr(self, name) for name in pair):
                raise ValueError(f"{' and '.join(pair)} cannot both be on; switch one of them off")

    @classmethod
    def none(cls) -> Optimizations:
        """Every switch off."""
        return cls()

    @classmethod
    def all(cls) -> Optimizations:
        """Every step of the ladder that one card has."""
        return cls.up_to(EXPERTS[-1])

    @classmethod
    def up_to(cls, step: str) -> Optimizations:
        """The ladder up to and including ``step``: a row of the guide's tables.

        Raises:
            ValueError: ``step`` is not a step of the ladder.
        """
        ladder = (*LADDER, *EXPERTS, *PARALLEL)
        if step in QUANTIZED:
            return cls.all().replace(**{step: True})
        if step not in ladder:
            raise ValueError(f"no step {step!r} in the ladder; the steps are {', '.join((*ladder, *QUANTIZED))}")
        return cls(**dict.fromkeys(ladder[: ladder.index(step) + 1], True))

    @classmethod
    def only(cls, step: str) -> Optimizations:
        """``step`` and what it needs, nothing else."""
        return cls.of([step], with_requirements=True)

    @classmethod
    def of(cls, steps: Iterable[str], *, with_requirements: bool = False) -> Optimizations:
        """The named switches; with ``with_requirements`` also what they need.

        Raises:
            ValueError: an unknown name, or an impossible combination.
        """
        switched: dict[str, bool] = {}
        pending = list(steps)
        while pending:
            name = pending.pop()
            known = LADDER + EXPERTS + PARALLEL + QUANTIZED + VARIANTS + QUANTIZED_VARIANTS
            if name not in known:
                raise ValueError(f"no optimisation {name!r}; there are {', '.join(known)}")
            switched[name] = True
            if with_requirements:
                pending.extend(needed for needed in REQUIRES.get(name, ()) if needed not in switched)
        return cls(**switched)

    def names(self) -> tuple[str, ...]:
        """The switches that are on, in ladder order."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))

    @property
    def scheme(self) -> Literal["w8a16", "w8a8"] | None:
        """The step of 8-bit weights that is on."""
        return "w8a16" if self.w8a16 else "w8a8" if self.w8a8 else None

    @classmethod
    def for_model(cls, given: Optimizations | None, config: Any, stored: str | None = None) -> Optimizations:
        """The switches that a model of ``config`` runs with.

        Args:
            given: as the caller says; None for all, and the step of 8-bit weights that the checkpoint is made for.
            stored: the scheme of the checkpoint (``checkpoint.quantization``); None where it is not quantised.

        Raises:
            UnsupportedError: a step of 8-bit weights that the checkpoint does not serve.
        """
        if given is None:
            given = cls.all() if stored is None else cls.up_to(stored)
        return given.of_model(config, stored)

    def of_model(self, config: Any, stored: str | None = None) -> Optimizations:
        """Without the steps that a model of ``config`` has nothing to switch for.

        Raises:
            UnsupportedError: as of :meth:`for_model`.
        """
        scheme, mixture = self.scheme, config.model_type == "qwen2_moe"
        if scheme is not None and stored is None:
            raise UnsupportedError(
                f"{scheme}: the weights of this checkpoint are not quantised; write one with qwen2-npu quantize "
                f"--scheme {scheme}, or switch {scheme} off"
            )
        if scheme == "w8a8" and stored == "w8a16":
            raise UnsupportedError(
                "w8a8: this checkpoint is quantised for w8a16, whose activations stay as they are; write one with "
                "qwen2-npu quantize --scheme w8a8, or use w8a16"
            )
        if scheme is not None and mixture:
            raise UnsupportedError(
                f"{scheme}: a mixture of experts is not computed in 8 bits; pass optimizations=Optimizations.all(), "
                "which dequantises the weights while they are read"
            )
        return self if mixture else self.replace(**dict.fromkeys(EXPERTS, False))

    def replace(self, **changes: Any) -> Optimizations:
        """A copy with some switches changed."""
        return replace(self, **changes)
