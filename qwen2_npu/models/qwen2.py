"""The causal language model: :class:`~qwen2_npu.models.backbone.Backbone` with the output head, and ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from qwen2_npu.checkpoint.weights import CAUSAL_LM
from qwen2_npu.compat import LOGITS_IN_FLOAT32, TIED_WEIGHTS
from qwen2_npu.models import arguments
from qwen2_npu.models.backbone import Backbone
from qwen2_npu.models.layers import Linear
from qwen2_npu.models.passes import shifted_loss


class Qwen2ForCausalLM(Backbone, GenerationMixin):  # type: ignore[misc]
    """A transformers causal language model whose every optimisation is a switch.

    Swap the import and keep the script: ``from_pretrained``, ``forward``, ``generate`` and ``save_pretrained`` take and
    return what the stock class does. For inference: parameters require no gradient.

    Args:
        config: see :class:`Backbone`, with the other arguments.
    """

    head = CAUSAL_LM
    _tied_weights_keys = TIED_WEIGHTS

    def _make_head(self, config: Qwen2Config) -> None:
        self.lm_head = Linear(config.hidden_size, self.ranks.shard.count("vocabulary", config), bias=False)

    def get_output_embeddings(self) -> nn.Module:
        """The product that gives the logits."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """For transformers' ``resize_token_embeddings``."""
        self.lm_head = new_embeddings

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.optimizations.kv_scatter and hidden_states.shape[1] == 1:  # a product of two dimensions
            logits = self.lm_head(hidden_states.squeeze(1)).unsqueeze(1)
        else:
            logits = self.lm_head(hidden_states)
        logits = self._of_all_ranks(logits)
        return logits.float() if LOGITS_IN_FLOAT32 else logits

    def _of_all_ranks(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, kept, tokens of this rank) -> (B, kept, V): the same bits on every rank, so that all choose one token."""
        if logits.shape[-1] < self.vocab_size:
            return self.ranks.all_gather(logits)
        return self.ranks.from_first(logits)

    def _output(self, values: Any, labels: Any, live: torch.Tensor | None, **others: Any) -> ModelOutput:
        loss = None
        if labels is not None:
            arguments.check_gradient(self.training, values)
            loss = shifted_loss(values, labels, live)
        return CausalLMOutputWithPast(loss=loss, logits=values, **others)
