"""Qwen2 with other heads than that of the causal language model: without one, and for classification.

Shapes: B batch, S new tokens, H hidden, L labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.models import arguments
from qwen2_npu.models.backbone import Backbone
from qwen2_npu.models.layers import Linear


class _WithoutGeneration(Backbone):
    """A model whose head gives no tokens."""

    generation_config: Any = None

    @classmethod
    def can_generate(cls) -> bool:
        """No."""
        return False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} generates no tokens: load the checkpoint with Qwen2ForCausalLM")


class Qwen2Model(_WithoutGeneration):
    """The network without a head, for embeddings and rewards: see :class:`Backbone` for the arguments.

    Reads the checkpoints of all Qwen2 classes.
    """

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **others: Any,
    ) -> Any:
        """The hidden states (B, S, H) of all positions after the final norm, as ``last_hidden_state``.

        Args:
            input_ids: see :meth:`Backbone.forward`, with the other arguments.

        Returns:
            ``BaseModelOutputWithPast``; hidden states at positions whose mask is 0 are unspecified.
        """
        arguments.check_names(others, type(self).__name__)
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, None, use_cache, output_attentions,
            output_hidden_states, return_dict, cache=cache,
        )  # fmt: skip

    def get_decoder(self) -> Qwen2Model:
        """This model."""
        return self

    def _output(self, values: Any, labels: Any, live: torch.Tensor | None, **others: Any) -> ModelOutput:
        return BaseModelOutputWithPast(last_hidden_state=values, **others)


class _Classifier(_WithoutGeneration):
    """A linear head over labels."""

    def _make_head(self, config: Any) -> None:
        self.num_labels: int = config.num_labels
        self.score = Linear(config.hidden_size, self.num_labels, bias="score.bias" in self.head)

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.score(hidden_states)
        return scores

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **others: Any,
    ) -> Any:
        """The scores, as ``logits``, and with ``labels`` the loss.

        Args:
            input_ids: see :meth:`Backbone.forward`, with the other arguments.
            labels: see the class.

        Raises:
            ValueError: as of :meth:`Backbone.forward`; labels that do not fit; see the class.
        """
        arguments.check_names(others, type(self).__name__)
        given = arguments.tokens_of(input_ids, inputs_embeds)
        wanted = self._wanted(given, attention_mask)
        output = super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, None, use_cache, output_attentions,
            output_hidden_states, True, cache=cache,
        )  # fmt: skip
        scores, loss = output.logits, None
        if wanted is not None:
            scores = scores[torch.arange(len(wanted), device=wanted.device), wanted]
        if labels is not None:
            arguments.check_gradient(self.training, scores)
            loss = self._loss(scores, labels, attention_mask)
        output = type(output)(**(dict(output) | {"loss": loss, "logits": scores}))
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _wanted(self, given: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """(B) the position of each row whose scores are wanted; None for all positions."""
        return None

    def _loss(self, scores: torch.Tensor, labels: Any, mask: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError


class Qwen2ForSequenceClassification(_Classifier):
    """Scores (B, L) of every sequence, at its last token that is not ``config.pad_token_id``: the last of all where
    embeddings are given. ``forward`` refuses what has no such token, or has it masked.

    Labels are (B) integers, or (B) or (B, L) numbers. What loss is computed of them, ``config.problem_type`` says, or
    else their dtype and the number of labels, as in the stock class. See :class:`Backbone` for the arguments.
    """

    head = ("score.weight",)

    def _wanted(self, given: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, tokens = given.shape[:2]
        padding = self.config.pad_token_id
        if padding is None and batch > 1:
            raise ValueError(
                f"a batch of {batch} and config.pad_token_id=None: set it to the padding token of the tokenizer, or "
                "pass one sequence at a time"
            )
        if padding is None or given.is_floating_point():
            last = torch.full((batch,), tokens - 1, device=given.device)
        else:
            position = torch.arange(tokens, device=given.device)
            last = (position * (given != padding)).argmax(-1)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and len(mask) == batch and mask.shape[1] >= tokens:
            masked = ~mask[:, -tokens:].to(given.device).gather(1, last[:, None])[:, 0].bool()
            if bool(masked.any()):
                row = int(masked.nonzero()[0])
                raise ValueError(
                    f"row {row}: attention_mask is 0 at position {int(last[row])}, the last token that is not "
                    f"config.pad_token_id={padding}: set it to the padding token of the tokenizer, or pad on the left"
                )
        return last

    def _loss(self, scores: torch.Tensor, labels: Any, mask: torch.Tensor | None) -> torch.Tensor:
        if not isinstance(labels, torch.Tensor):
            raise ValueError(f"labels is a {type(labels).__name__}: pass a tensor with one row per sequence")
        labels = labels.to(scores.device)
        integers = labels.dtype in arguments.INTEGERS
        kind: Any = self.config.problem_type
        if kind is None:
            kind = "regression" if self.num_labels == 1 else f"{'single' if integers else 'multi'}_label_classification"
        one_each = kind == "single_label_classification" or self.num_labels == 1
        wanted = (len(scores),) if one_each else tuple(scores.shape)
        if labels.squeeze(-1).shape != wanted and labels.shape != wanted:
            raise ValueError(f"labels of shape {tuple(labels.shape)} for problem_type={kind!r}: pass {wanted}")
        if kind == "single_label_classification":
            arguments.check_vocabulary(labels, self.num_labels, "label")
            return F.cross_entropy(scores, labels.reshape(-1).long())
        labels = labels.reshape(scores.shape).to(scores.dtype)
        if kind == "regression":
            return F.mse_loss(scores, labels)
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(scores, labels)
        raise ValueError(
            f"config.problem_type={kind!r}: use regression, single_label_classification or multi_label_classification"
        )

    def _output(self, values: Any, labels: Any, live: torch.Tensor | None, **others: Any) -> ModelOutput:
        return SequenceClassifierOutputWithPast(logits=values, **others)


class Qwen2ForTokenClassification(_Classifier):
    """Scores (B, S, L) of every token; those at positions whose mask is 0 are unspecified.

    Labels are (B, S) of torch.int64: the loss is the mean over those that are neither -100 nor at padding. See
    :class:`Backbone` for the arguments. transformers 4.37.0 has no such class.
    """

    head = ("score.weight", "score.bias")

    def _loss(self, scores: torch.Tensor, labels: Any, mask: torch.Tensor | None) -> torch.Tensor:
        arguments.check_labels(labels, self.num_labels)
        if labels.shape != scores.shape[:2]:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: pass {tuple(scores.shape[:2])}")
        counted = labels.to(scores.device)
        if mask is not None:
            counted = counted.masked_fill(mask[:, -counted.shape[1] :] == 0, arguments.IGNORED_LABEL)
        return F.cross_entropy(scores.float().flatten(0, 1), counted.flatten())

    def _output(self, values: Any, labels: Any, live: torch.Tensor | None, **others: Any) -> ModelOutput:
        others.pop(CACHE_NAME)
        return TokenClassifierOutput(logits=values, **others)
