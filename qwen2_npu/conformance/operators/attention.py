"""What the three attention goldens share: layouts, lengths, and softmax(scale·QKᵀ, masked)·V with its bound.

Axes: B batch, N heads, S positions, D head width, H = N·D. Goldens work in BNSD.

Tolerance, per output element o = Σ p_j v_j. Rounding the scores, the subtraction of the maximum and exp
perturb the weights: p_j(1+η_j), |η_j| <= e_j, and normalising with the same weights gives an error of at most
Σ p_j e_j (|v_j|+|o|) / (1 - Σ p_j e_j). On top: the weights are cast to the dtype before the product with V
(u per term; where they underflow, ``tiny`` per value), both sums have n terms in float32, and the result is
rounded once.

- float32 scores (bfloat16, float32, high precision): a score is a float32 dot product of width D, so it is
  off by at most (D+2)·u32·scale·|q|·|k|; e_j adds u32·|s_j - max| (subtraction) and 4·u32 (exp within 2 ulp).
- float16 scores (npu_prompt_flash_attention's default): the *unscaled* dot product is rounded to float16
  (u·scale·|q·k|), scaled in float16 (u·|s|), reduced by the maximum (u·|s - max|), exponentiated (2u); the
  sum runs in float16 as a tree (ceil(log2 n)·u), and so does the division (u).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen2_npu.conformance.operators.rounding import FORMATS, U32, Array, FloatArray

LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND")


def from_bnsd(x: FloatArray, layout: str) -> FloatArray:
    """(B,N,S,D) -> the memory layout of an output."""
    if layout == "BNSD":
        return x
    bsnd = np.ascontiguousarray(np.swapaxes(x, 1, 2))
    return bsnd.reshape(*bsnd.shape[:2], bsnd.shape[2] * bsnd.shape[3]) if layout == "BSH" else bsnd


def input_layout(layout: str) -> str:
    """BNSD_BSND reads BNSD and writes BSND."""
    return layout.split("_")[0]


def output_layout(layout: str) -> str:
    return layout.split("_")[-1]


def to_bnsd(x: FloatArray, layout: str, heads: int) -> FloatArray:
    """The memory layout of an input -> (B,N,S,D)."""
    if layout == "BNSD":
        return x
    bsnd = x.reshape(*x.shape[:2], heads, x.shape[2] // heads) if layout == "BSH" else x
    return np.swapaxes(bsnd, 1, 2)


def per_row(lengths: Sequence[int] | None, batch: int, default: int) -> list[int]:
    """One length per batch row; a single one is shared."""
    if lengths is None:
        return [default] * batch
    return list(lengths) * batch if len(lengths) == 1 else list(lengths)


@dataclass(frozen=True)
class AttendedRow:
    """One (batch row, head): out (Sq,D), its bound, the log-sum-exp (Sq) and its bound."""

    out: FloatArray
    bound: FloatArray
    lse: FloatArray
    lse_bound: FloatArray


def attend(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    scale: float,
    keep: Array,
    dtype: str,
    fill: float | None = None,
    float16_scores: bool = False,
) -> AttendedRow:
    """Attention of one head: q (Sq,D), k and v (Skv,D), keep (Sq,Skv) bool.

    Args:
        fill: the score of positions that are not kept; None excludes them, and a row without any gives zeros.
        float16_scores: bound for scores and softmax in float16 rather than float32.
    """
    form, width, n = FORMATS[dtype], q.shape[1], max(k.shape[0], 1)
    raw, magnitude = q @ k.T, np.abs(q) @ np.abs(k).T
    scores = scale * raw
    off = scale * magnitude * (width + 2) * U32  # error of each score
    if fill is not None:
        scores, off, raw = np.where(keep, scores, fill), np.where(keep, off, 0.0), np.where(keep, raw, 0.0)
        keep = np.ones_like(keep)
    empty = ~keep.any(axis=1, keepdims=True)
    top = np.max(np.where(keep, scores, -np.inf), axis=1, keepdims=True, initial=-np.inf)
    top = np.where(empty, 0.0, top)
    shifted = np.where(keep, scores - top, 0.0)
    weights = np.where(keep, np.exp(shifted), 0.0)
    total = weights.sum(axis=1, keepdims=True)
    p = weights / np.where(empty, 1.0, total)
    out = p @ v

    e = off + (np.abs(shifted) + 4) * U32
    sums = 2 * (n + 16) * U32
    if float16_scores:
        e = e + form.unit * (np.abs(scale * raw) + np.abs(scores) + np.abs(shifted) + 2)
        sums += form.unit * (np.ceil(np.log2(n)) + 1)
    eta = np.expm1(np.where(keep, np.minimum(e, 1.0), 0.0))  # e reaches 1 only where the weight underflows to zero
    spread = (p * eta).sum(axis=1, keepdims=True)
    mass = p @ np.abs(v)
    perturbed = ((p * eta) @ np.abs(v) + spread * np.abs(out)) / (1 - spread)
    computed = perturbed + (form.unit + sums) * mass + form.tiny * np.abs(v).sum(axis=0)
    bound = computed + form.unit * (np.abs(out) + computed) + form.tiny
    bound = np.where(empty, 0.0, bound)

    lse = np.where(empty, np.inf, top + np.log(np.where(empty, 1.0, total)))
    lse_bound = np.where(empty, 0.0, spread / (1 - spread) + sums + 4 * U32 * (1 + np.abs(lse)))
    return AttendedRow(out, bound, lse[:, 0], lse_bound[:, 0])
