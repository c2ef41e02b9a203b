"""How the model plugs into transformers' ``generate``, on 4.37.0 and on 5.x.

``generate`` itself stays transformers' own. What is added: the fixed KV cache is allocated before the first forward
pass from the length ``generate`` has settled on, and kept for the next call of the same shape.
"""

from __future__ import annotations

from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from qwen2_npu.cache import CacheShape, FixedKVCache
from qwen2_npu.compat import CACHE_NAME, IS_V4, cache_of, growing_cache, one_cache
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models import arguments
from qwen2_npu.parallel import generation as parallel

if TYPE_CHECKING:
    from qwen2_npu.models.qwen2 import Qwen2ForCausalLM


class CachePool:
    """At most one idle fixed cache, handed out again to the next call of the same shape.

    A cache that is in use, or that a caller keeps, is not in the pool: nobody's tokens are ever overwritten. Threads
    may share a pool: taking and giving back are single operations of the deque.
    """

    def __init__(self) -> None:
        self._idle: deque[FixedKVCache] = deque(maxlen=1)

    @property
    def idle(self) -> FixedKVCache | None:
        """The cache the next call may get."""
        return next(iter(self._idle), None)

    def take(self, shape: CacheShape) -> FixedKVCache:
        """An empty cache of ``shape``; the idle one at its addresses if it fits, else a new one."""
        try:
            cache = self._idle.pop()
        except IndexError:
            return FixedKVCache(shape)
        if cache.shape != shape:
            del cache  # free it before its successor is allocated
            return FixedKVCache(shape)
        cache.reset()
        return cache

    def give_back(self, cache: FixedKVCache) -> None:
        """Keep ``cache`` for the next call."""
        self._idle.append(cache)


@dataclass
class GenerateCall:
    """One running ``generate``. ``caches``: those it took from the pool."""

    model: Any
    caches: list[FixedKVCache] = field(default_factory=list)
    max_length: int | None = None


_CALL: ContextVar[GenerateCall | None] = ContextVar("generate", default=None)
"""The innermost ``generate`` of this thread: other threads may be using the same model."""


class GenerationHooks:
    """The methods of ``generate`` that this model answers differently. Mixed into Qwen2ForCausalLM."""

    _pool: CachePool

    def _start_generation(self) -> None:
        self._pool = CachePool()

    def _call(self) -> GenerateCall | None:
        call = _CALL.get()
        return call if call is not None and call.model is self else None

    def generate(self: Qwen2ForCausalLM, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        """transformers' ``generate`` with all its options; see there.

        Raises:
            ValueError: a prompt of another form than (B, S) ids, an empty one, ids outside the vocabulary, padding on
                the right, a mask that does not fit, or more tokens than the model has positions; the last new token
                takes none.
            UnsupportedError: ranks that share the model were given different arguments.
            CacheOverflowError: a cache passed as ``past_key_values`` (``cache``) is too small.
        """
        cache = arguments.check_cache(one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None)))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        prompt = {**kwargs, "inputs": args[0]} if args else kwargs
        arguments.check_prompt(prompt, self.device, continues=cache is not None)
        parallel.start(self.ranks, prompt, self.device)
        call = GenerateCall(self)
        token = _CALL.set(call)
        try:
            result = super().generate(*args, **kwargs)
            kept = cache_of(result)
            for cache in call.caches:
                if cache is not kept:
                    self._pool.give_back(cache)
            return result
        finally:
            _CALL.reset(token)

    def _check_length(self: Qwen2ForCausalLM, tokens: int, mask: torch.Tensor | None) -> None:  # type: ignore[misc]
        """Refuse, before the first token, a call that will be given more ``tokens`` per row than there are positions.

        The last token that is generated is given to nobody: it takes none.
        """
        positions = self.config.max_position_embeddings
        arguments.check_capacity(positions, arguments.live_tokens(mask, tokens, positions))

    def _cache_for_generation(self: Qwen2ForCausalLM, rows: int, tokens: int) -> Cache:  # type: ignore[misc]
        """A cache for ``tokens`` per row, padding included, and one more, which a continuation may want."""
        if not self.optimizations.fixed_kv_cache:
            return growing_cache()
        capacity = max(tokens, min(tokens + 1, self.config.max_position_embeddings))
        shape, call = self.cache_shape(rows, capacity), self._call()
        if call is None:  # nobody would give it back
            return FixedKVCache(shape)
        cache = self._pool.take(shape)
        call.caches.append(cache)
        return cache

    # ---- 5.x ----------------------------------------------------------------------------------------------------
    def _prepare_cache_for_generation(  # type: ignore[misc]
        self: Qwen2ForCausalLM,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        mask = model_kwargs.get("attention_mask")
        self._check_length(max_cache_length, mask)
        if model_kwargs.get(CACHE_NAME) is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UnsupportedError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model brings its own cache "
                f"(fixed_kv_cache={self.optimizations.fixed_kv_cache}); leave cache_implementation unset"
            )
        if generation_config.prefill_chunk_size is not None and mask is not None and not bool((mask != 0).all()):
            raise UnsupportedError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} with padded rows: a chunk may hold nothing "
                "but a row's padding; leave prefill_chunk_size unset, or pass rows of one length"
            )
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        # max_cache_length leaves out the last token, whose k and v are never read.
        model_kwargs[CACHE_NAME] = self._cache_for_generation(rows, max_cache_length)

    def _supports_logits_to_keep(self: Qwen2ForCausalLM) -> bool:  # type: ignore[misc]
        # generate() then asks for the last position only: exactly what the step is about.
        return self.optimizations.last_token_logits

    # ---- 4.37 ---------------------------------------------------------------------------------------------------
    def _validate_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        # Both versions call it once the final length is known, and all else is settled.
        parallel.check(self.ranks, generation_config)  # type: ignore[attr-defined]
        if (call := self._call()) is not None:
            call.max_length = generation_config.max_length
        super()._validate_generated_length(generation_config, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _reorder_cache(past_key_values: Cache, beam_idx: torch.Tensor) -> Cache:
        past_key_values.reorder_cache(beam_idx)  # type: ignore[arg-type]
        return past_key_values

    def prepare_inputs_for_generation(  # type: ignore[misc]
        self: Qwen2ForCausalLM,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next forward pass; see transformers."""
        past_key_values = one_cache(past_key_values, cache)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past == 0 and attention_mask is not None and not bool((attention_mask[:, -1] != 0).all()):
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(
                f"row {row} of the prompt is padded on the right (its attention_mask ends in 0); generation appends "
                "after the last position: tokenize with padding_side='left'"
            )
        if not IS_V4:
            return super().prepare_inputs_for_generation(
                input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **{CACHE_NAME: past_key_values},
                **kwargs,
            )
        use_cache = kwargs.get("use_cache")
        first_of_embeds = inputs_embeds is not None and past == 0
        if past == 0:
            rows, given = (inputs_embeds if inputs_embeds is not None else input_ids).shape[:2]
            # With inputs_embeds, max_length does not count the prompt.
            extra = given if first_of_embeds else 0
            call = self._call()
            tokens = given if call is None or call.max_length is None else max(given, call.max_length - 1 + extra)
            self._check_length(tokens, attention_mask)
            if past_key_values is None and use_cache:
                past_key_values = self._cache_for_generation(rows, tokens)
        if past > 0:
            total = attention_mask.shape[1] if attention_mask is not None else input_ids.shape[1]
            input_ids = input_ids[:, -(total - past) :]
        position_ids = kwargs.get("position_ids")
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if position_ids is not None and past > 0:
            position_ids = position_ids[:, -input_ids.shape[1] :]
        model_inputs: dict[str, Any] = {"inputs_embeds": inputs_embeds} if first_of_embeds else {"input_ids": input_ids}
        model_inputs.update(
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
        )
        if self.optimizations.last_token_logits:
            model_inputs["logits_to_keep"] = 1
        return model_inputs
