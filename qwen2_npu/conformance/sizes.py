"""The real dimensions of the published models, and of the tensor-parallel shards that graphs are lowered for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.optimizations import EXPERTS, LADDER, QUANTIZED

if TYPE_CHECKING:
    from transformers import Qwen2Config


@dataclass(frozen=True)
class Size:
    """Dimensions from the published config.json; of a shard, those of one card.

    Attributes:
        shards: cards one layer is split over.
        whole: the size that this is a shard of.
        experts: of each layer of a mixture; 0 in a dense model. A mixture has no MLP of ``intermediate`` columns.
        per_token: experts that each token goes to.
        expert_columns, shared_columns: of each expert, and of the one for all tokens.
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
    experts: int = 0
    per_token: int = 0
    expert_columns: int = 0
    shared_columns: int = 0

    def shard(self, count: int) -> Size:
        """What one of ``count`` tensor-parallel cards computes: its heads, its part of the MLP, its rows of lm_head.
        On one card, all of it.

        The numbers of :mod:`qwen2_npu.parallel.sharding`, without torch.

        Raises:
            ValueError: a dimension that ``count`` does not divide.
        """
        if count == 1:
            return self
        for name in ("heads", *COLUMNS):
            if getattr(self, name) % count:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} cannot be split over {count} cards")
        return replace(
            self,
            name=f"{self.name}-tp{count}",
            heads=self.heads // count,
            kv_heads=max(1, self.kv_heads // count),
            vocab=self.vocab if self.vocab % count else self.vocab // count,
            shards=count,
            whole=self,
            **{name: getattr(self, name) // count for name in COLUMNS},
        )

    @property
    def parameters(self) -> int:
        """Elements of all weights of this size (of this shard), the embedding table once per copy."""
        return self.parameters_with(self.experts)

    @property
    def activated(self) -> int:
        """Those that one token is computed with."""
        return self.parameters_with(self.per_token)

    def parameters_with(self, experts: int) -> int:
        """Those with so many of the experts of each layer; of a dense model, all."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = self.hidden * qkv + qkv + self.heads * self.head_dim * self.hidden + 2 * self.hidden
        layer += self.mlp_with(experts)
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def no_8_bits(self) -> str:
        """Why it is not measured with 8-bit weights, and what to do; empty where it is."""
        way_out = f"{self.name} is a mixture of experts, which is not computed in 8 bits; use {EXPERTS[-1]}"
        return way_out if self.experts else ""

    @property
    def quantised(self) -> int:
        """Those that are 8-bit integers where a dense model has 8-bit weights: of q, k, v, o, gate, up and down."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        return self.layers * (attention + self.mlp_with(0))

    @property
    def channels(self) -> int:
        """Output channels of those products, each of which has a scale. Every card has all of o and down."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * (qkv + 2 * self.intermediate + 2 * self.hidden)

    @property
    def widened(self) -> int:
        """Elements of scales and biases that a model with 8-bit weights has a float32 copy of, too."""
        return self.channels + self.layers * (self.heads + 2 * self.kv_heads) * self.head_dim

    def saved_bytes(self, step: str, item: int) -> int:
        """What 8-bit weights with their scales take less than weights of ``item`` bytes; nothing at any other step.

        Args:
            item: bytes of all that is no integer, the scales included.
        """
        return self.quantised * (item - 1) - self.channels * item if step in QUANTIZED else 0

    def mlp_with(self, experts: int) -> int:
        """Those of the MLP of one layer, with so many of its experts."""
        if not self.experts:
            return 3 * self.hidden * self.intermediate
        columns = self.shared_columns + experts * self.expert_columns
        return self.hidden * (3 * columns + self.experts + 1)  # the router, and the gate of the shared expert

    @property
    def ladder(self) -> tuple[str, ...]:
        """The steps that this model has."""
        return (*LADDER, *EXPERTS) if self.experts else LADDER

    def config(
        self, *, layers: int | None = None, max_position_embeddings: int = 32768, scheme: str | None = None
    ) -> Qwen2Config:
        """As transformers writes it (5.x: head_dim apart from the hidden size); of a shard, that of the whole model.

        Args:
            layers: fewer layers than the real model has.
            scheme: with 8-bit weights, made for "w8a16" or "w8a8".

        Raises:
            UnsupportedError: a mixture of experts, which the installed transformers does not know.
        """
        from qwen2_npu.checkpoint.quantization import FIELD, described
        from qwen2_npu.compat import CONFIGURATIONS

        if self.whole is not None:
            return self.whole.config(layers=layers, max_position_embeddings=max_position_embeddings, scheme=scheme)
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
        if scheme is not None:
            values[FIELD] = described(scheme)
        if not self.experts:
            return CONFIGURATIONS["qwen2"](**values)
        if MIXTURE not in CONFIGURATIONS:
            raise UnsupportedError(f"{self.name} is a mixture of experts, which transformers has from 5 on: install it")
        values |= {
            "num_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "moe_intermediate_size": self.expert_columns,
            "shared_expert_intermediate_size": self.shared_columns,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        return CONFIGURATIONS[MIXTURE](**values)


MIXTURE = "qwen2_moe"
"""transformers' name of a mixture of experts."""

COLUMNS = ("intermediate", "expert_columns", "shared_columns")
"""What the cards divide beside the heads; the router is on all of them."""

SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size("0.5B", 896, 4864, 24, 14, 2, 64, 151936, tied=True),
        Size("1.5B", 1536, 8960, 28, 12, 2, 128, 151936, tied=True),
        Size("7B", 3584, 18944, 28, 28, 4, 128, 152064, tied=False),
        Size("72B", 8192, 29568, 80, 64, 8, 128, 152064, tied=False),
        Size(
            "57B-A14B", 3584, 18944, 28, 28, 4, 128, 151936, tied=False,
            experts=64, per_token=8, expert_columns=2560, shared_columns=20480,
        ),
    )
}  # fmt: skip
SHARDS = {"7B": (2, 4), "72B": (8,), "57B-A14B": (2, 4)}
SIZES |= {shard.name: shard for name, counts in SHARDS.items() for shard in map(SIZES[name].shard, counts)}
"""Name -> size. ``72B-tp8`` is one card of the documented eight."""
