"""How the model plugs into transformers' ``generate``, on 4.37.0 and on 5.x.

``generate`` itself stays transformers' own. What is added: the fixed KV cache is allocated before the first forward
pass from the length ``generate`` has settled on, and kept for the next call of the same shape.
"""

from __future__ import annotations

import warnings
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
    """One running ``generate``.

    Attributes:
        given: its arguments by name.
        caches: those it took from the pool.
        width: ids that ``max_length`` counts before the first new token.
        new_tokens: per row, at most.
        started: whether the first forward pass has been prepared.
        agreeing: a mask that says of the cache's tokens what the cache does; transformers appends a 1 for each new one.
    """

    model: Any
    given: dict[str, Any]
    caches: list[FixedKVCache] = field(default_factory=list)
    width: int = 0
    new_tokens: int = 0
    started: bool = False
    agreeing: torch.Tensor | None = None


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

        A cache that is passed grows to what the call needs. More new tokens than the model has positions for are cut
        with a warning; the last new token takes none.

        Raises:
            ValueError: a prompt of another form than (B, S) ids, an empty one, ids outside the vocabulary, padding on
                the right, a mask that does not fit, or a prompt of more tokens than the model has positions.
            UnsupportedError: an option that this model does not serve; ranks that share the model were given different
                arguments.
        """
        cache = self._check_cache(one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None)))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        prompt = {**kwargs, "inputs": args[0]} if args else kwargs
        arguments.check_prompt(
            prompt, self.device, self.vocab_size, past=None if cache is None else cache.get_seq_length()
        )
        parallel.start(self.ranks, prompt, self.device)
        call = GenerateCall(self, prompt)
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

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching pages the caches of its requests.

        Raises:
            UnsupportedError: with the call that works.
        """
        raise UnsupportedError(
            "continuous batching (generate_batch and what it is made of) runs on paged caches, which this model does "
            "not have: pass the requests as one left-padded batch to generate(input_ids, attention_mask=…)"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _settle(self: Qwen2ForCausalLM, configuration: Any, model_kwargs: dict[str, Any]) -> int:  # type: ignore[misc]
        """Fit a call into the positions of the model and into the cache that it was given.

        Returns:
            Tokens per row that are computed, past and padding included: all but the last new one.

        Raises:
            ValueError: the prompt, or as many new tokens as must be, take more positions than there are.
        """
        call = self._call()
        assert call is not None
        cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        embeds, positions = model_kwargs.get("inputs_embeds"), self.config.max_position_embeddings
        past = 0 if cache is None else cache.get_seq_length()
        prompt = call.width if embeds is None else embeds.shape[1]
        covered = getattr(configuration, "_mask_length", prompt) if mask is None else mask.shape[1]
        if covered != prompt:  # the new tokens alone were passed
            prompt += past
        new_tokens = configuration.max_length - call.width
        total = prompt + new_tokens - 1
        over = arguments.live_tokens(mask, total, positions) - positions
        if (given := call.given.get("position_ids")) is not None:
            over = max(over, int(given.max()) + new_tokens - positions)
        if over > 0:
            least = configuration.min_new_tokens or max((configuration.min_length or 0) - call.width, 1)
            arguments.check_capacity(positions, positions + over - (new_tokens - min(least, new_tokens)))
            warnings.warn(
                f"{new_tokens} new tokens after this prompt need {positions + over} positions, the model has "
                f"max_position_embeddings={positions}: {new_tokens - over} are generated at most",
                stacklevel=4,
            )
            new_tokens, total = new_tokens - over, total - over
            configuration.max_length -= over
            if configuration.max_new_tokens is not None:
                configuration.max_new_tokens = new_tokens
        call.new_tokens = new_tokens
        if isinstance(cache, FixedKVCache):
            cache.grow(max(cache.lengths) + total - past)
        return total

    def _agrees(self, mask: torch.Tensor | None) -> None:
        """Note that ``mask`` says of the cache's tokens what the cache does."""
        if (call := self._call()) is not None:
            call.agreeing = mask

    def _is_continued(self, mask: torch.Tensor | None) -> bool:
        """Whether ``mask`` is one that this ``generate`` has made out of one that agreed: nobody must look into it."""
        call = self._call()
        return call is not None and mask is not None and mask is call.agreeing

    def _headroom(self, least: int) -> int:
        """Slots beyond the prompt for a cache that ``forward`` allocates: within ``generate`` (classifier-free guidance
        has a cache of its own) as many as there will be new tokens."""
        call = self._call()
        return least if call is None else max(least, call.new_tokens)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        call, before = self._call(), model_kwargs.get("attention_mask")
        positions = model_kwargs.get("position_ids")
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if call is not None:
            agreed = before is not None and before is call.agreeing
            call.agreeing = updated.get("attention_mask") if agreed else None
        if IS_V4 and positions is not None:  # 5.x does so itself
            updated["position_ids"] = torch.cat((positions, positions[:, -1:] + 1), dim=1)
        return updated

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
        # Without the last new token, whose k and v are never read.
        tokens = self._settle(generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        if model_kwargs.get(CACHE_NAME) is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        fixed = self.optimizations.fixed_kv_cache
        if generation_config.cache_implementation not in ((None,) if fixed else (None, "dynamic")):
            raise UnsupportedError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model brings its own cache; "
                "leave cache_implementation unset, or pass past_key_values=model.allocate_cache(batch_size=…, "
                f"capacity=…){'; with fixed_kv_cache off, dynamic is served' if fixed else ''}"
            )
        if generation_config.prefill_chunk_size is not None and mask is not None and not bool((mask != 0).all()):
            raise UnsupportedError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} with padded rows: a chunk may hold nothing "
                "but a row's padding; leave prefill_chunk_size unset, or pass rows of one length"
            )
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs[CACHE_NAME] = self._cache_for_generation(rows, tokens)

    def _supports_logits_to_keep(self: Qwen2ForCausalLM) -> bool:  # type: ignore[misc]
        # generate() then asks for the last position only: exactly what the step is about.
        return self.optimizations.last_token_logits

    # ---- 4.37 ---------------------------------------------------------------------------------------------------
    def _validate_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        # Both versions call it once the final length is known, and all else is settled.
        parallel.check(self.ranks, generation_config)  # type: ignore[attr-defined]
        arguments.check_generation(generation_config)
        if (call := self._call()) is not None:
            call.width = args[0] if args else kwargs["input_ids_length"]
        super()._validate_generated_length(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _get_generation_mode(self, generation_config: Any, assistant_model: Any) -> Any:
        mode = super()._get_generation_mode(generation_config, assistant_model)  # type: ignore[misc]
        arguments.check_mode(mode.value)
        return mode

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        # The first hook of 4.37.0 that sees the mask, and the last before max_length is made use of.
        if IS_V4 and self._call() is not None:
            self._settle(generation_config, kwargs["model_kwargs"])  # type: ignore[misc]
        return super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]

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
        call = self._call()
        if past == 0 if call is None else not call.started:
            given = call is None or call.given.get("attention_mask") is not None
            arguments.check_ends(input_ids, attention_mask, given)
        if call is not None:
            call.started = True
        if IS_V4:
            return self._inputs_of_v4(input_ids, past_key_values, attention_mask, inputs_embeds, **kwargs)
        return super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME: past_key_values},
            **kwargs,
        )

    def _inputs_of_v4(  # type: ignore[misc]
        self: Qwen2ForCausalLM,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """What 4.37.0 leaves to the model: a cache for the first pass, positions, and the ids that are new.

        It needs nothing of that version, so that it is tested with any.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        computed = input_ids if inputs_embeds is None else inputs_embeds
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if past > 0:
            total = attention_mask.shape[1] if attention_mask is not None else input_ids.shape[1]
            inputs_embeds, computed = None, input_ids[:, -(total - past) :]
            if position_ids is not None:
                position_ids = position_ids[:, -computed.shape[1] :]
        elif past_key_values is None and use_cache:
            call = self._call()
            new_tokens = 1 if call is None else call.new_tokens
            rows, tokens = computed.shape[:2]
            past_key_values = self._cache_for_generation(rows, tokens + new_tokens - 1)
        model_inputs: dict[str, Any] = {
            "input_ids" if inputs_embeds is None else "inputs_embeds": computed,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
        }
        if self.optimizations.last_token_logits:
            model_inputs["logits_to_keep"] = 1
        return model_inputs
