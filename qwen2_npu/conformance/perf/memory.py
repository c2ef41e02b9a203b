"""Peak device memory as a formula: weights, cache, tables, and what one layer of prefill has alive at once.

The peak is in prefill. While a layer runs, four (T, H) tensors are alive around whatever it computes: the layer's two
inputs, which its caller still holds, the sum after attention, and the normed one. T = batch · prompt tokens; "elements"
are of 2 bytes. Workspaces that a device's own operators ask for are not in the formula: ``SLACK`` leaves room for them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qwen2_npu.conformance.perf.lower_bound import kv_per_token
from qwen2_npu.conformance.sizes import Size
from qwen2_npu.optimizations import ORIGINAL, QUANTIZED, Optimizations

BYTES = 2  # bf16
FLOAT32 = 4
CAPACITY_BUCKET = 128
"""``qwen2_npu.cache.CAPACITY_BUCKET``, which this file, free of torch, cannot import."""

POSITIONS = 32768
COMPRESSED_MASK = 2048 * 2048
"""Bytes of the triangular mask that prefill passes from last_token_logits on."""

IN_PLACE_HEAD_DIM = 128
"""npu_apply_rotary_pos_emb writes in place; other head sizes take npu_rotary_mul, which does not."""

SCORE_COPIES = 5
"""(B, N, S, S) tensors of small-operator attention at its softmax, in 2-byte units: the scores, their cast to float32,
and the result in float32."""

TOLERANCE = 1.02
SLACK = 256 << 20


@dataclass(frozen=True)
class MemoryFormula:
    """Bytes on one card."""

    weights: int
    cache: int
    tables: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.tables + self.activations

    def fault(self, peak: int) -> str | None:
        """What is wrong with a measured peak; None where it fits the formula."""
        least = self.weights + self.cache
        most = round(self.total * TOLERANCE) + SLACK
        if least <= peak <= most:
            return None
        parts = ", ".join(f"{name} {value / 1e6:,.1f}" for name, value in vars(self).items())
        bound = f"below {least / 1e6:,.1f}" if peak < least else f"above {most / 1e6:,.1f}"
        what = (
            "weights or cache are not what the row says"
            if peak < least
            else "something holds memory that the formula does not know"
        )
        return f"memory: peak {peak / 1e6:,.1f} MB is {bound} MB ({parts}): {what}"


def steps_on(step: str) -> tuple[str, ...]:
    """The switches of a row's step."""
    return () if step == ORIGINAL else Optimizations.up_to(step).names()


def memory_of(
    size: Size,
    step: str,
    batch: int,
    tokens: int,
    decode_steps: int,
    *,
    cards: int = 1,
    positions: int = POSITIONS,
    float32_logits: bool = False,
) -> MemoryFormula:
    """The formula.

    Args:
        tokens: of the prompt, per row.
        float32_logits: the model upcasts all logits it returns (transformers 4.37).
    """
    shard = size.shard(cards)
    # AutoTP does not cut the embedding; a tied head it cuts apart from it.
    left_whole = (size.vocab - (0 if size.tied else shard.vocab)) * size.hidden if step == ORIGINAL and cards > 1 else 0
    on = steps_on(step)
    length = tokens + decode_steps + 1
    fixed = "fixed_kv_cache" in on
    slots = -(-length // CAPACITY_BUCKET) * CAPACITY_BUCKET if fixed else length - 1  # the last token's is never needed
    tables = 2 * positions * shard.head_dim * BYTES if fixed else 0
    tables += COMPRESSED_MASK if "last_token_logits" in on else 0
    tables += shard.widened * FLOAT32 if step in QUANTIZED else 0
    elements = _elements_per_token(shard, on, batch, tokens, float32_logits)
    return MemoryFormula(
        weights=BYTES * (shard.parameters + left_whole) - shard.saved_bytes(step, BYTES),
        cache=BYTES * batch * slots * kv_per_token(shard),
        tables=tables,
        activations=BYTES * batch * tokens * elements,
    )


def _elements_per_token(size: Size, on: Collection[str], batch: int, tokens: int, float32_logits: bool) -> int:
    """Elements alive at the peak, per token of the prompt."""
    hidden, inner = size.hidden, size.shared_columns if size.experts else size.intermediate
    around = 4 * hidden + 2 * size.head_dim  # and cos, sin
    norm = 2 * hidden + 2 if "add_rms_norm" in on else 5 * hidden + 2
    mlp = 3 * inner if "swiglu" in on else 4 * inner
    if "w8a8" in on:  # sums of gate and up in int32, their product in int8, and two float32 scales
        mlp = 4 * inner + inner // 2 + 4
    if size.experts:  # of each copy of a token: it, gate and up, their product, and the result; the shared one's
        mlp = max(mlp, size.per_token * (2 * hidden + 3 * size.expert_columns) + hidden)
    weights = 0 if on else size.heads * tokens  # the stock layer holds its attention's until it returns
    inside = max(_attention(size, on, tokens), weights + max(norm, mlp, inner + hidden))
    vocab = size.vocab if size.whole is None else size.whole.vocab
    gathered = size.vocab + vocab if on and size.vocab < vocab else 0  # a part, and the parts side by side
    logits = 0 if "last_token_logits" in on else hidden + max(vocab * (3 if float32_logits else 1), vocab + gathered)
    ids = 3 * 4  # token ids, mask and positions, int64
    mask = -(-tokens // (BYTES * batch)) if "flash_attention" in on and "last_token_logits" not in on else 0
    return max(around + inside, logits) + ids + mask


def _attention(size: Size, on: Collection[str], tokens: int) -> int:
    """The attention block's own, at whichever of its moments is the widest."""
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    product = q + 2 * kv
    if "flash_attention" not in on:
        states = 4 * q + 2 * kv if size.heads > size.kv_heads else 2 * q + 3 * kv  # without groups nothing is repeated
        return states + SCORE_COPIES * size.heads * tokens
    copies = product if "fused_qkv" in on else 0  # contiguous parts of the one product
    if size.head_dim == IN_PLACE_HEAD_DIM:
        attending = product + copies + q
    else:
        rotating = product + copies + q + kv
        attending = max(rotating, product + (kv if copies else 0) + q + kv + q)
    return max(attending, product + q + size.hidden)
