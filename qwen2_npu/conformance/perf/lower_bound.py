"""The least time a row can take on a card: bytes over bandwidth, or operations over peak, whichever is more.

8-bit weights are read as such, each with a scale per output channel; embedding, head, norms and biases are not
quantised. With ``w8a8`` those products count at the peak of integers.

A lower bound for every step of the ladder, so it counts only what none can do without: each weight read once, live KV
read once, the products of the live tokens, the causal half of the prompt's attention, one row of logits. Of the last
layer of a prefill k and v of all tokens, and the rest of one token per row (the step ``last_layer``). Norms,
activations, communication and launches are left out. A measurement below it is a timing error, or was made on another
card.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2_npu.conformance.machine.hardware import Hardware
from qwen2_npu.conformance.sizes import Size
from qwen2_npu.optimizations import Phase

BYTES = 2  # bf16


@dataclass(frozen=True)
class Work:
    """What one step must move and multiply, on one card. ``integer_operations``: of 8-bit integers, not among the
    others."""

    bytes: float
    operations: float
    integer_operations: float = 0.0

    def memory_ms(self, card: Hardware) -> float:
        """Milliseconds at least, moving."""
        return 1e3 * self.bytes / card.memory_bandwidth.value

    def compute_ms(self, card: Hardware) -> float:
        """The same, multiplying: one unit makes the products of both kinds."""
        return 1e3 * (self.operations / card.bf16_peak.value + self.integer_operations / card.int8_peak.value)

    def floor_ms(self, card: Hardware) -> float:
        """The same, at once."""
        return max(self.memory_ms(card), self.compute_ms(card))


def kv_per_token(size: Size) -> int:
    """Elements of k and v that one token adds, over all layers."""
    return 2 * size.layers * size.kv_heads * size.head_dim


def parameters_per_step(size: Size) -> int:
    """Elements a step reads whole, at least: each weight but an embedding table of its own; of experts, one token's."""
    return size.activated - (0 if size.tied else size.vocab * size.hidden)


def work(
    size: Size, phase: Phase, batch: int, tokens: float, cards: int = 1, *, step: str = "", item: int = BYTES
) -> Work:
    """The least work of one step.

    Args:
        size: the whole model.
        tokens: of the prompt (prefill), or in the cache before the step (decode; a mean will do).
        cards: the model is split over; weights, heads and KV evenly.
        step: of the ladder; only those of 8-bit weights are other work.
        item: bytes of what is not quantised.
    """
    shard = size.shard(cards)
    weights = parameters_per_step(shard)
    head = shard.vocab * shard.hidden
    products = weights - head  # biases and norms are counted as if they multiplied: under a thousandth
    if phase == "prefill":
        computed, pairs, kv = batch * tokens, batch * tokens * (tokens + 1) / 2, batch * tokens
    else:
        computed, pairs, kv = batch, batch * (tokens + 1), batch * (tokens + 1)
    query = shard.heads * shard.head_dim
    last = shard.hidden * 2 * query + shard.mlp_with(shard.per_token)  # the last layer, but k and v
    attention = 4 * query * ((shard.layers - 1) * pairs + kv)
    integers = 2 * ((shard.quantised - last) * computed + last * batch) if step == "w8a8" else 0
    return Work(
        bytes=item * (weights + kv * kv_per_token(shard)) - shard.saved_bytes(step, item),
        operations=2 * (products - last) * computed + 2 * (last + head) * batch + attention - integers,
        integer_operations=integers,
    )
