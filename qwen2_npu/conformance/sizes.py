"""The real dimensions of the documented models, and of one tensor-parallel shard of the largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Qwen2Config


@dataclass(frozen=True)
class Size:
    """Dimensions from the published config.json; of a shard, those of one card.

    Attributes:
        shards: cards one layer is split over.
        whole: the size that this is a shard of.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    shards: int = 1
    whole: Size | None = None

    def shard(self, count: int) -> Size:
        """What one of ``count`` tensor-parallel cards computes: its heads, its part of the MLP, its rows of lm_head.

        The numbers of :mod:`qwen2_npu.parallel.sharding`, without torch.

        Raises:
            ValueError: a dimension that ``count`` does not divide.
        """
        for name in ("heads", "intermediate"):
            if getattr(self, name) % count:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} cannot be split over {count} cards")
        return Size(
            name=f"{self.name}-tp{count}",
            hidden=self.hidden,
            intermediate=self.intermediate // count,
            layers=self.layers,
            heads=self.heads // count,
            kv_heads=max(1, self.kv_heads // count),
            head_dim=self.head_dim,
            vocab=self.vocab if self.vocab % count else self.vocab // count,
            tied=self.tied,
            shards=count,
            whole=self,
        )

    @property
    def parameters(self) -> int:
        """Elements of all weights of this size (of this shard), the embedding table once per copy."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = self.hidden * qkv + qkv + self.heads * self.head_dim * self.hidden
        layer += 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def config(self, *, layers: int | None = None, max_position_embeddings: int = 32768) -> Qwen2Config:
        """As transformers writes it (5.x: head_dim apart from the hidden size); of a shard, that of the whole model.

        Args:
            layers: fewer layers than the real model has.
        """
        from transformers import Qwen2Config

        if self.whole is not None:
            return self.whole.config(layers=layers, max_position_embeddings=max_position_embeddings)
        values: dict[str, Any] = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers if layers is None else layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": max_position_embeddings,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        return Qwen2Config(**values)


SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size("0.5B", 896, 4864, 24, 14, 2, 64, 151936, tied=True),
        Size("1.5B", 1536, 8960, 28, 12, 2, 128, 151936, tied=True),
        Size("7B", 3584, 18944, 28, 28, 4, 128, 152064, tied=False),
        Size("72B", 8192, 29568, 80, 64, 8, 128, 152064, tied=False),
    )
}
SIZES |= {shard.name: shard for shard in (SIZES["7B"].shard(2), SIZES["7B"].shard(4), SIZES["72B"].shard(8))}
"""Name -> size. ``72B-tp8`` is one card of the documented eight."""
