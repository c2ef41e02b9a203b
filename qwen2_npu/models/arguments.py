"""What callers pass to ``forward``, checked before anything is computed or written.

Shapes: B batch, S new tokens, T tokens including the past, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache

from qwen2_npu.checkpoint.sources import check_dtype
from qwen2_npu.compat import CACHE_NAME, cached_rows
from qwen2_npu.errors import UnsupportedError

IGNORED = ("cache_position", "is_first_iteration", "tokenizer")
"""What some version of ``generate`` hands on to every model, and this one does not need."""

REFUSED = {
    "num_logits_to_keep": "its name is logits_to_keep",
    "num_items_in_batch": "the loss is the mean over the labels of this call",
    "shift_labels": "pass labels: they are shifted here",
}
"""What the stock model acts on, or callers believe it does, and why it is not taken here."""


IGNORED_LABEL = -100
"""What no loss is computed of."""


def check_names(arguments: dict[str, Any], model: str = "Qwen2ForCausalLM") -> None:
    """Refuse keyword arguments that would have an effect which they do not have here.

    Args:
        model: the name of its class.

    Raises:
        TypeError: with their names.
    """
    wrong = [name for name, value in arguments.items() if name not in IGNORED and value is not None]
    if wrong:
        reasons = "".join(f"; {name}: {REFUSED[name]}" for name in wrong if name in REFUSED)
        raise TypeError(f"{model}.forward() takes no argument {', '.join(wrong)}{reasons}")


INTEGERS = (torch.int64, torch.int32)
"""What ids and positions may be: what ``torch.nn.Embedding`` takes."""


def tokens_of(input_ids: Any, inputs_embeds: Any) -> torch.Tensor:
    """The one of the two that is given: (B, S) ids or (B, S, H) embeddings.

    Raises:
        ValueError: both or neither, no tensor, another number of dimensions or dtype, or an empty prompt.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        name, given, wanted = "input_ids", input_ids, "input_ids (batch, tokens)"
        _check_tensor(name, given, "(batch, tokens) of token ids")
    else:
        name, given, wanted = "inputs_embeds", inputs_embeds, "inputs_embeds (batch, tokens, hidden)"
        _check_tensor(name, given, "(batch, tokens, hidden) of embeddings")
    assert isinstance(given, torch.Tensor)
    if given.dim() != (2 if input_ids is not None else 3):
        raise ValueError(f"{wanted} expected, got shape {tuple(given.shape)}")
    if given.shape[0] == 0 or given.shape[1] == 0:
        raise ValueError(f"empty prompt: {wanted} has shape {tuple(given.shape)}; give every row at least one token")
    if input_ids is not None:
        _check_integers(name, given)
    return given


def check_tensors(
    table: torch.Tensor, vocabulary: int, cache: Any, input_ids: Any, inputs_embeds: Any, mask: Any, labels: Any
) -> torch.Tensor:
    """Check all that ``forward`` is given but positions and the values of ids; return what :func:`tokens_of` does.

    Args:
        table: (tokens of this rank, H) the model's own embeddings.
        vocabulary: V.

    Raises:
        ValueError: what does not fit, with what does.
        UnsupportedError: a dtype that the model does not compute in.
    """
    check_precision(table)
    given = tokens_of(input_ids, inputs_embeds)
    batch, tokens = given.shape[:2]
    check_cache(cache, batch)
    check_mask(mask, batch, 0 if cache is None else cache.get_seq_length(), tokens)
    check_devices(table.device, input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=mask)
    if inputs_embeds is not None:
        check_embeds(inputs_embeds, table)
    if labels is not None:
        check_labels(labels, vocabulary)
    return given


def check_precision(weight: torch.Tensor) -> None:
    """Refuse a dtype of the weights that no NPU computes in, and an autocast to another one than theirs.

    Raises:
        UnsupportedError: with the way to another dtype.
    """
    check_dtype(weight.dtype, "call model.float()")
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and (wanted := torch.get_autocast_dtype(kind)) != weight.dtype:
        raise UnsupportedError(
            f"torch.autocast({kind!r}, dtype={wanted}) around a model of {weight.dtype}: it computes in the dtype of "
            f"its weights; load it with dtype={str(wanted).removeprefix('torch.')!r}, or call it outside of autocast"
        )


def check_prompt(call: dict[str, Any], device: torch.device, vocabulary: int, past: int | None) -> None:
    """Check what ``generate`` is given before transformers meets it. Synchronises.

    Args:
        call: its arguments by name.
        device: the model's. transformers moves ``input_ids`` to it, and nothing else.
        vocabulary: V.
        past: tokens per row in the cache, which the mask may cover while ``input_ids`` leave them out; None without a
            cache.

    Raises:
        ValueError: what does not fit, with what does.
    """
    embeds, mask = call.get("inputs_embeds"), call.get("attention_mask")
    input_ids = call.get("inputs", call.get("input_ids"))
    if embeds is not None:
        tokens_of(None, embeds)
    elif input_ids is not None:
        check_vocabulary(tokens_of(input_ids, None), vocabulary)
    if call.get("negative_prompt_ids") is not None:
        check_vocabulary(call["negative_prompt_ids"], vocabulary, "negative_prompt_ids: token id")
    if call.get("position_ids") is not None:
        _check_tensor("position_ids", call["position_ids"], "(batch, tokens)")
    given = input_ids if embeds is None else embeds
    if mask is not None:
        _check_tensor("attention_mask", mask, "(batch, tokens) of 0 and 1")
    if given is not None and past and given.shape[1] <= past:
        batch, tokens = given.shape[:2]
        if mask is None or mask.dim() != 2 or mask.shape[1] == tokens:
            raise ValueError(
                f"the prompt has {tokens} tokens per row, and the cache holds {past} already: pass the whole sequence, "
                "or the new tokens alone with an attention_mask (batch, past + new tokens) = "
                f"({batch}, {past + tokens})"
            )
    if mask is None:
        return
    if given is not None:
        batch, tokens = given.shape[:2]
        covered = mask.shape[1] if past is not None and mask.dim() == 2 else tokens
        check_mask(mask, batch, max(covered - tokens, 0), tokens)
    check_devices(device, attention_mask=mask)
    check_mask_values(mask)


def check_ends(input_ids: torch.Tensor, mask: torch.Tensor | None, given: bool) -> None:
    """Refuse a prompt whose last token is padding, since generation goes on after it. Synchronises where there is a
    mask.

    Args:
        given: whether the caller passed ``mask``; else transformers made it out of the pad tokens.

    Raises:
        ValueError: with the way out.
    """
    if mask is None or bool((live := mask[:, -1].bool()).all()):
        return
    row = int((~live).nonzero()[0])
    if given:
        raise ValueError(
            f"row {row} of the prompt is padded on the right (its attention_mask ends in 0); generation appends "
            "after the last position: tokenize with padding_side='left'"
        )
    raise ValueError(
        f"row {row} of the prompt ends in the pad token {input_ids[row, -1].item()}, which generate() takes for "
        "padding where no attention_mask is given: tokenize with padding_side='left' and pass the attention_mask; or "
        "pass torch.ones_like(input_ids) if it is a token as others are"
    )


MODES_OF_TUPLES = {
    "assisted_generation": "assistant_model, prompt_lookup_num_tokens",
    "contrastive_search": "penalty_alpha",
}
"""Modes of generation that 4.37.0 implements over tuples of tensors alone, and the arguments that choose them."""


def check_mode(mode: str) -> None:
    """Refuse a mode of generation that takes the KV cache apart.

    Raises:
        UnsupportedError: naming the arguments that choose it.
    """
    if mode in MODES_OF_TUPLES:
        raise UnsupportedError(
            f"{mode.replace('_', ' ')} ({MODES_OF_TUPLES[mode]}) takes the KV cache apart as transformers "
            f"{transformers.__version__} does, in tuples, which this model does not have: leave it out, or install "
            "'transformers>=5,<6', which has assisted decoding and prompt lookup for it"
        )


def check_generation(configuration: Any) -> None:
    """Refuse options of ``generate`` that reach into the stock model.

    Args:
        configuration: the GenerationConfig.

    Raises:
        UnsupportedError: naming the option and what to take.
    """
    for name in ("assistant_early_exit", "use_mtp"):
        if (value := getattr(configuration, name, None)) not in (None, False):
            raise UnsupportedError(
                f"{name}={value!r} drafts with layers of the stock model, and this one runs all of its layers: take "
                "assistant_model=… or prompt_lookup_num_tokens=…"
            )


def check_embeds(embeds: torch.Tensor, table: torch.Tensor) -> None:
    """Refuse embeddings that are not like the rows of ``table``, the model's own.

    Raises:
        ValueError: another hidden size or dtype.
    """
    if embeds.shape[2] != table.shape[1]:
        raise ValueError(
            f"inputs_embeds of shape {tuple(embeds.shape)}: the model has hidden_size={table.shape[1]}; pass "
            f"(batch, tokens, {table.shape[1]})"
        )
    if embeds.dtype != table.dtype:
        raise ValueError(
            f"inputs_embeds is {embeds.dtype}, the model {table.dtype}: pass inputs_embeds.to(model.dtype)"
        )


def check_devices(device: torch.device, **given: Any) -> None:
    """Refuse tensors on another device than the model's.

    Raises:
        ValueError: naming the tensor and both devices.
    """
    for name, tensor in given.items():
        if isinstance(tensor, torch.Tensor) and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the model on {device}: pass {name}.to(model.device)")


def check_mask(mask: Any, batch: int, past: int, tokens: int) -> None:
    """Refuse an ``attention_mask`` that is not (B, T).

    Raises:
        ValueError: with the shape to pass.
    """
    if mask is None:
        return
    wanted = f"pass a 2-D mask (batch, past + new tokens) = ({batch}, {past + tokens}) of 0 and 1"
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"attention_mask is a {type(mask).__name__}: {wanted}")
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: {wanted}")
    if mask.shape[1] != past + tokens:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but {past} are in the cache and {tokens} are new: {wanted}"
        )


def check_mask_values(mask: torch.Tensor) -> None:
    """Refuse a mask that holds more than 0 and 1, such as one that is to be added to the scores. Synchronises.

    Raises:
        ValueError: naming a value.
    """
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        raise ValueError(f"attention_mask holds {wrong[0].item()}: pass 1 for a token and 0 for padding, nothing else")


def check_vocabulary(ids: torch.Tensor, vocab_size: int, name: str = "token id") -> None:
    """Refuse ids that no embedding exists for. Synchronises.

    Raises:
        ValueError: naming the id.
    """
    low, high = _extremes(ids)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} {low if low < 0 else high} is outside the vocabulary of {vocab_size}: does the tokenizer belong "
            "to this model?"
        )


def check_labels(labels: Any, vocab_size: int) -> None:
    """Refuse labels that no loss can be computed of. Synchronises.

    Raises:
        ValueError: no (B, …) tensor of int64, or a label that is neither -100 nor in the vocabulary.
    """
    wanted = f"(batch, tokens) of torch.int64, with {IGNORED_LABEL} where none counts"
    _check_tensor("labels", labels, wanted)
    if labels.dim() != 2 or labels.dtype != torch.int64:
        raise ValueError(f"labels of shape {tuple(labels.shape)} and {labels.dtype}: pass a tensor {wanted}")
    if labels.numel():
        check_vocabulary(labels.masked_fill(labels == IGNORED_LABEL, 0), vocab_size, "label")


def check_cache(cache: Any, batch: int | None = None) -> Any:
    """``cache`` as it is.

    Args:
        batch: rows of the new tokens, where they are known.

    Raises:
        ValueError: it is not a transformers ``Cache``, or a growing one of another number of rows.
    """
    if cache is None:
        return None
    wanted = "pass a cache of allocate_cache(), or the one of an earlier output"
    if not isinstance(cache, Cache):
        raise ValueError(f"{CACHE_NAME} is a {type(cache).__name__}: {wanted}")
    rows = cached_rows(cache)
    if batch is not None and rows is not None and rows != batch:
        raise ValueError(f"{CACHE_NAME} holds {rows} rows, and the batch has {batch}: {wanted} of the same batch")
    return cache


def rows_of_positions(position_ids: Any, mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
    """``position_ids`` as (B, S), 0 at padding, whose position nobody reads; None where none are given.

    Args:
        mask: (B, T).
        tokens: (B, S, …) what they are the positions of.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if position_ids is None:
        return None
    batch, length = tokens.shape[:2]
    wanted = f"(batch or 1, new tokens) = ({batch} or 1, {length})"
    _check_tensor("position_ids", position_ids, wanted)
    given: torch.Tensor = position_ids[None] if position_ids.dim() == 1 else position_ids
    if given.dim() != 2 or given.shape[0] not in (1, batch) or given.shape[1] != length:
        raise ValueError(f"position_ids of shape {tuple(position_ids.shape)}: pass {wanted}")
    _check_integers("position_ids", given)
    check_devices(tokens.device, position_ids=given)
    given = given.expand(batch, -1).contiguous()
    return given if mask is None or length == 1 else given.masked_fill(mask[:, -length:] == 0, 0)


def check_positions(positions: int, total: int, position_ids: torch.Tensor | None) -> None:
    """Refuse positions that the rotary table has no row for.

    Args:
        positions: the model's.
        total: tokens per row, past included.
        position_ids: to look into, which synchronises; None not to.

    Raises:
        ValueError: naming the position.
    """
    way_out = f"the model has max_position_embeddings={positions}: shorten the prompt, or raise it in the config"
    if total > positions:
        raise ValueError(f"{total} tokens need as many positions, {way_out}")
    if position_ids is not None:
        low, high = _extremes(position_ids)
        if low < 0 or high >= positions:
            raise ValueError(f"position_ids holds {low if low < 0 else high}, {way_out}")


def check_capacity(positions: int, needed: int) -> None:
    """Refuse more tokens than the model has positions, before the first of them is computed.

    Raises:
        ValueError: with both numbers.
    """
    if needed > positions:
        raise ValueError(
            f"prompt and new tokens need {needed} positions, the model has max_position_embeddings={positions}: "
            "shorten the prompt or lower max_new_tokens"
        )


def live_tokens(mask: torch.Tensor | None, total: int, limit: int) -> int:
    """Tokens of the longest row; its padding, which takes no position, is left out where ``total`` is above ``limit``.

    Args:
        mask: (B, W) of the first W of ``total`` tokens per row; those after it all count. It is looked into above the
            limit alone: that synchronises.
    """
    if mask is None or total <= limit:
        return total
    return total - int((mask == 0).sum(dim=1).min())


def check_gradient(training: bool, values: torch.Tensor) -> None:
    """Refuse the loss of a training step that nothing can be learned from.

    Args:
        training: whether the model is in training mode.
        values: what the loss is computed of.

    Raises:
        UnsupportedError: with the model to train.
    """
    if training and torch.is_grad_enabled() and not values.requires_grad:
        raise UnsupportedError(
            "this model is for inference, and none of its parameters requires a gradient: train the stock model and "
            "load the result here, or call eval() before a loss that is only looked at"
        )


def kept_positions(logits_to_keep: Any, tokens: int) -> slice | torch.Tensor | None:
    """What indexes the positions whose logits are wanted; None for all as they stand.

    Args:
        logits_to_keep: the last so many, 0 for all; or whatever may index the tokens' axis, as for the stock model.

    Raises:
        ValueError: what cannot index it.
    """
    if isinstance(logits_to_keep, int):
        return None if logits_to_keep == 0 or logits_to_keep >= tokens else slice(-logits_to_keep, None)
    if logits_to_keep is None or isinstance(logits_to_keep, slice):
        return logits_to_keep
    wanted = f"pass a number of positions, or a tensor of positions from {-tokens} to {tokens - 1}"
    if isinstance(logits_to_keep, list):
        logits_to_keep = torch.as_tensor(logits_to_keep)
    if not isinstance(logits_to_keep, torch.Tensor) or logits_to_keep.dtype not in (*INTEGERS, torch.bool):
        kind = getattr(logits_to_keep, "dtype", type(logits_to_keep).__name__)
        raise ValueError(f"logits_to_keep is a {kind}: {wanted}")
    if logits_to_keep.dtype == torch.bool:
        if logits_to_keep.shape != (tokens,):
            raise ValueError(f"logits_to_keep has {tuple(logits_to_keep.shape)} booleans for {tokens} tokens: {wanted}")
    elif logits_to_keep.device.type == "cpu" and logits_to_keep.numel():
        low, high = _extremes(logits_to_keep)
        if low < -tokens or high >= tokens:
            raise ValueError(f"logits_to_keep holds {low if low < -tokens else high}: {wanted}")
    return logits_to_keep


def _extremes(values: torch.Tensor) -> tuple[int, int]:
    if values.device.type == "cpu":  # numpy sees the same memory, and needs no launch for each
        array = values.detach().numpy()
        return int(array.min()), int(array.max())
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return int(low), int(high)


def _check_tensor(name: str, value: Any, wanted: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: pass a tensor {wanted}")


def _check_integers(name: str, value: torch.Tensor) -> None:
    if value.dtype not in INTEGERS:
        raise ValueError(f"{name} holds {value.dtype}: pass {' or '.join(map(str, INTEGERS))}")
