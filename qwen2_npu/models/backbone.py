"""Qwen2 (and Qwen1.5) written once against the ``npu::`` operators, below its head: transformers' contract around it.

Reading order: ``decoder.Network.forward`` is the network; :meth:`Backbone.prefill_step` and ``decode_step`` are the two
functions that are compiled; :meth:`Backbone.forward` turns what transformers passes into their arguments. Heads are in
:mod:`qwen2_npu.models.qwen2` and :mod:`qwen2_npu.models.heads`.

Shapes: B batch, S new tokens, H hidden, V vocabulary, D head_dim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2Config
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

import qwen2_npu.ops  # noqa: F401 - defines torch.ops.npu where torch_npu does not
from qwen2_npu.cache import CacheShape, FixedKVCache, round_prompt
from qwen2_npu.checkpoint.configuration import check_fields
from qwen2_npu.checkpoint.quantization import quantization_of
from qwen2_npu.checkpoint.weights import check_room
from qwen2_npu.compat import (
    CACHE_NAME,
    check_config,
    described,
    expert_count,
    growing_cache,
    grows_whole,
    one_cache,
    settled,
    sliding_windows,
    unchanged_on_error,
)
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models import arguments
from qwen2_npu.models.attention import AttentionInputs, AttentionPhase
from qwen2_npu.models.decoder import LayerCache, Network, Record
from qwen2_npu.models.experts import Experts
from qwen2_npu.models.generation import GenerationHooks
from qwen2_npu.models.inputs import MaskFactory, Rows, check_window, fixed_cache_step, pad_tokens, positions_after
from qwen2_npu.models.layers import TABLE_ROWS, RowParallelLinear
from qwen2_npu.models.passes import Pass, Prepared
from qwen2_npu.models.pretrained import CheckpointIO
from qwen2_npu.models.quantized import QuantizedLinear
from qwen2_npu.optimizations import Optimizations
from qwen2_npu.parallel.collectives import ALONE, Ranks

DEFAULT_HEADROOM = 256
"""Slots beyond the prompt in a cache that forward() has to allocate itself, outside of generate()."""


class Backbone(CheckpointIO, GenerationHooks, PreTrainedModel):  # type: ignore[misc]
    """The network, its caches and one forward pass over them: what the models with different heads share.

    Args:
        config: a transformers ``Qwen2Config`` (model_type qwen2: Qwen2 dense sizes and Qwen1.5).
        optimizations: the switches; all of the ladder by default.
        ranks: those that share the model, one process and card each; this one holds its part of the weights. All of
            them must make the same calls. One by default.

    Raises:
        UnsupportedError: a configuration this model does not serve, or that the ranks cannot share.
    """

    config_class: type[Any] = Qwen2Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - as transformers declares it
    _supports_cache_class = True
    accepts_loss_kwargs = False  # of Trainer: the loss is the mean over the labels of one call
    _decoder: tuple[Any, ...] = ()  # in a tuple: not a submodule

    def __init__(self, config: Qwen2Config, optimizations: Optimizations | None = None, ranks: Ranks = ALONE) -> None:
        check_fields(config)
        config = settled(config)
        check_config(config)
        stored = quantization_of(config)
        optimizations = Optimizations.for_model(optimizations, config, None if stored is None else stored.scheme)
        ranks.check(config, optimizations)
        check_room(config, ranks.shard)
        config._attn_implementation = (
            "eager"  # transformers checks its own kernels against the class; ours are the npu:: ones
        )
        if expert_count(config):
            config._experts_implementation = "eager"
        super().__init__(config)
        self.optimizations = optimizations
        self.ranks = ranks
        self.model = Network(config, self.optimizations, ranks)
        self.vocab_size = config.vocab_size
        self._make_head(config)
        windows = {window for window in sliding_windows(config) if window is not None}
        self._window: int | None = min(windows, default=None)
        self._masks = MaskFactory(self.optimizations, self._window)
        self._known_shape: Any = None
        self._start_generation()
        self.compiled_steps: dict[str, Callable[..., torch.Tensor]] = {}
        self.post_init()
        self.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, QuantizedLinear):
            module.reset_parameters(std)

    def _make_head(self, config: Qwen2Config) -> None:
        """The modules that ``head`` names the parameters of."""

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the head computes of the hidden states (B, S, H) after the final norm."""
        return hidden_states

    def get_input_embeddings(self) -> nn.Module:
        """The table of this rank."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """For transformers' ``resize_token_embeddings``.

        Raises:
            UnsupportedError: every rank holds a part of the table.
        """
        if self.ranks.size > 1:
            raise UnsupportedError(
                f"embeddings of a model that {self.ranks.size} ranks share cannot be replaced or resized: do it with "
                "tp_size=1, save it, and load that"
            )
        self.model.embed_tokens = value

    def get_decoder(self) -> Any:
        """The model without its head, over the same weights: its first output is the last hidden state."""
        if not self._decoder:
            from qwen2_npu.models.heads import Qwen2Model

            config: Any = self.config
            with torch.device("meta"):
                decoder = Qwen2Model(config, self.optimizations, self.ranks)
            decoder.model = self.model
            decoder.config = self.config  # it may change, by resize_token_embeddings
            self._decoder = (decoder.eval(),)
        return self._decoder[0]

    # ---- caches --------------------------------------------------------------------------------------------------
    def cache_shape(self, batch_size: int, capacity: int) -> CacheShape:
        """Shape, and so the memory, of the fixed cache for ``batch_size`` rows of ``capacity`` tokens."""
        return CacheShape.of(
            self.config,
            kv_heads=self.ranks.shard.count("kv heads", self.config),
            batch_size=batch_size,
            capacity=capacity,
            layout="BSND" if self.optimizations.flash_attention else "BNSD",
            dtype=self.dtype,
            device=self.device,
            sliding_window=self._window,
        )

    def allocate_cache(self, batch_size: int, capacity: int) -> Cache:
        """A cache to pass as ``past_key_values``: fixed, or with ``fixed_kv_cache`` off the stock growing one.

        Args:
            capacity: tokens per row it must hold, padding included.

        Raises:
            ValueError: ``capacity`` is beyond the model's positions.
            MemoryError: it does not fit the device.
        """
        if not self.optimizations.fixed_kv_cache:
            return growing_cache()
        arguments.check_capacity(self.config.max_position_embeddings, capacity)
        return FixedKVCache(self.cache_shape(batch_size, capacity))

    def _prepare_rotary(
        self, device: torch.device, tokens: int, cache: Cache | None, position_ids: torch.Tensor | None, padded: int
    ) -> None:
        """Have the rotary table hold the positions of ``tokens``, and those that the cache has room for: a generation
        then has one table from its first step to its last, and one graph.

        Args:
            position_ids: to look into, which synchronises; None not to.
            padded: tokens of rows whose padding takes positions, too.
        """
        self._open_communicator(device)
        self.model.prepare_quantized()
        rotary = self.model.rotary
        needed = max(tokens, cache.shape.capacity) if isinstance(cache, FixedKVCache) else tokens
        if position_ids is not None and rotary.positions > TABLE_ROWS:  # else all are there: nothing to look at
            needed = max(needed, int(position_ids.max()) + 1)
        rotary.prepare(self.dtype, device, needed, padded)

    def _open_communicator(self, device: torch.device) -> None:
        """With mm_all_reduce: name the communicator of the ranks to the products, before the first graph."""
        if self.optimizations.mm_all_reduce and self.model.layers[0].self_attn.o_proj.hcom is None:
            hcom = self.ranks.communicator(device)
            for module in self.model.layers.modules():
                if isinstance(module, RowParallelLinear) and module.ranks.size > 1:
                    module.hcom = hcom

    # ---- the two steps that are compiled -------------------------------------------------------------------------
    def prefill_step(
        self, tokens: torch.Tensor, inputs: AttentionInputs, caches: list[LayerCache], logit_index: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits of the prompt (B, S or kept, V).

        Args:
            logit_index: (B, kept) positions whose logits are wanted; None for all.
        """
        return self._kept_logits(tokens, "prefill", inputs, caches, logit_index)

    def decode_step(self, tokens: torch.Tensor, inputs: AttentionInputs, caches: list[LayerCache]) -> torch.Tensor:
        """Logits (B, 1, V) of one token per row."""
        return self._logits(self.model(tokens, "decode", inputs, caches), None)

    def _kept_logits(
        self,
        tokens: torch.Tensor,
        phase: AttentionPhase,
        inputs: AttentionInputs,
        caches: list[LayerCache],
        logit_index: torch.Tensor | None,
        record: Record | None = None,
    ) -> torch.Tensor:
        """With last_layer, the last layer computes nothing whose logits nobody wants, but for k and v."""
        few = logit_index is not None and logit_index.shape[1] < tokens.shape[1]
        if few and record is None and self.optimizations.last_layer:
            return self._logits(self.model(tokens, phase, inputs, caches, None, logit_index), None)
        return self._logits(self.model(tokens, phase, inputs, caches, record), logit_index)

    def _logits(self, hidden_states: torch.Tensor, logit_index: torch.Tensor | None) -> torch.Tensor:
        if logit_index is not None:
            index = logit_index[:, :, None].expand(-1, -1, hidden_states.shape[-1])
            hidden_states = hidden_states.gather(1, index)
        return self._head(hidden_states)

    def _of_all_heads(self, attentions: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
        """(B, N, S, T) of every layer that has attention weights, from (B, heads of this rank, S, T)."""
        return tuple(self.ranks.all_gather(weights, axis=1) for weights in attentions if weights is not None)

    # ---- transformers' contract ----------------------------------------------------------------------------------
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **others: Any,
    ) -> Any:
        """One forward pass.

        Args:
            input_ids: (B, S) token ids; or ``inputs_embeds`` (B, S, H).
            attention_mask: (B, past + S) of 0 and 1 (2-D); padding may stand anywhere, and a token in the cache that is
                0 is left out of this call. Reading it waits for the device once, but not in the steps of generate().
            position_ids: (B or 1, S); default: the number of tokens before each, padding included, as for the stock
                model.
            past_key_values: a cache of :meth:`allocate_cache`, or the one of the previous output. ``cache`` is the name
                it has from transformers 5.24 on; both are taken on every version.
            labels: -100 = ignored, for the mean loss over those that a live position predicts: (B, S), which brings the
                logits of all positions, or (B, kept) for the kept ones.
            logits_to_keep: the last so many positions only, 0 for all, or a tensor of positions. ``generate`` asks for
                1 with last_token_logits.
            others: refused, but for what ``generate`` hands to every model.

        Returns:
            ``CausalLMOutputWithPast``; logits at positions whose mask is 0 are unspecified.

        Raises:
            ValueError: inputs that do not fit; see the message. On a device other than the CPU the ids and positions
                of a step of one token are not looked into: it would have to wait for the device.
            TypeError: an argument that this model would have to ignore.
            CacheOverflowError: more tokens than the cache holds; nothing has been written then.
        """
        arguments.check_names(others, type(self).__name__)
        cache = self._check_cache(one_cache(past_key_values, cache))
        config, table = self.config, self.model.embed_tokens.weight
        given = arguments.check_tensors(
            table, config.vocab_size, cache, input_ids, inputs_embeds, attention_mask, labels
        )
        tokens = given.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        self._check_outputs(output_attentions)
        use_cache = config.use_cache if use_cache is None else use_cache
        over_all = labels is not None and labels.shape[1] == tokens
        kept = None if over_all else arguments.kept_positions(logits_to_keep, tokens)
        one = isinstance(kept, torch.Tensor) and kept.dim() == 0
        wanted = torch.atleast_1d(kept) if isinstance(kept, torch.Tensor) else kept
        asked = Pass(
            given,
            attention_mask,
            arguments.rows_of_positions(position_ids, attention_mask, given),
            past,
            wanted,
            ([], []) if output_attentions or output_hidden_states else None,
        )
        if input_ids is not None and asked.looked_into:
            arguments.check_vocabulary(input_ids, config.vocab_size)
        prepare = self._prepare_fixed if self.optimizations.fixed_kv_cache else self._prepare_growing
        run, cache = prepare(asked, cache, use_cache)
        with unchanged_on_error(cache):
            logits = run()
        if one:
            logits = logits[:, 0]
        live = None if attention_mask is None else attention_mask[:, -tokens:]
        if live is not None and wanted is not None:
            live = live[:, wanted]
        hidden_states, attentions = asked.record or ([], [])
        output = self._output(
            logits,
            labels,
            live,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=self._of_all_heads(attentions) if output_attentions else None,
            **{CACHE_NAME: cache if use_cache else None},
        )
        return_dict = config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _output(self, values: Any, labels: Any, live: torch.Tensor | None, **others: Any) -> ModelOutput:
        """What ``forward`` returns.

        Args:
            values: (B, S or kept, …) what the head computed.
            labels: for the loss, or None.
            live: (B, S or kept) 1 where a position is not padding; None where none is.
            others: its remaining fields.
        """
        raise NotImplementedError

    def _check_cache(self, cache: Any) -> Any:
        """``cache`` as it is, if this model can write it.

        Raises:
            UnsupportedError: with the call that makes one.
        """
        if arguments.check_cache(cache) is None:
            return None
        fixed = self.optimizations.fixed_kv_cache
        if not (isinstance(cache, FixedKVCache) if fixed else grows_whole(cache)):
            raise UnsupportedError(
                f"{CACHE_NAME} is {described(cache)}: with fixed_kv_cache {'on' if fixed else 'off'} pass "
                "model.allocate_cache(batch_size=…, capacity=…), the cache of an earlier output, or none"
            )
        weight = self.model.embed_tokens.weight
        known = (cache.shape, weight.dtype, weight.device) if fixed else self._known_shape
        if known != self._known_shape:  # once per cache, not once per step
            rows, capacity = cache.shape.batch_size, cache.shape.capacity
            own = replace(self.cache_shape(rows, capacity), capacity=capacity)
            if cache.shape != own:
                raise UnsupportedError(
                    f"{CACHE_NAME} is the {cache.shape.describe()} on {cache.shape.device}, and this model writes a "
                    f"{own.describe()} on {own.device}: pass one of this model's allocate_cache(batch_size=…, "
                    "capacity=…)"
                )
            self._known_shape = known
        return cache

    def _check_outputs(self, output_attentions: bool) -> None:
        if output_attentions and self.optimizations.fixed_kv_cache:
            raise UnsupportedError(
                f"output_attentions=True: with {' and '.join(self.optimizations.names()[:2])} on, attention "
                "weights are not kept; use optimizations with fixed_kv_cache and flash_attention off"
            )

    def _prepare_fixed(self, asked: Pass, cache: Any, use_cache: bool) -> Prepared:
        """Over the fixed cache (:class:`FixedKVCache`), allocated here where there is none."""
        batch, tokens = asked.given.shape[:2]
        positions = self.model.rotary.positions
        if cache is not None:
            cache.check_room(batch, tokens)
        before = [0] * batch if cache is None else cache.lengths
        rows = self._rows(asked, cache)
        longest = max(map(operator.add, before, rows.lengths))
        seen = asked.position_ids if asked.looked_into else None
        arguments.check_positions(positions, longest, seen)
        if cache is None and use_cache:
            capacity = max(tokens, min(tokens + self._headroom(DEFAULT_HEADROOM), positions))
            cache = FixedKVCache(self.cache_shape(batch, capacity))
        padded = asked.total if asked.position_ids is None else 0
        self._prepare_rotary(asked.given.device, asked.total, cache, seen, padded)
        return Prepared(partial(self._forward_fixed, asked, rows, cache), cache)

    def _rows(self, asked: Pass, cache: FixedKVCache | None) -> Rows:
        """What the mask says of the new tokens and of those in the cache."""
        batch, tokens = asked.given.shape[:2]
        if cache is None or cache.seen_tokens == 0:
            rows = Rows.of(asked.mask, batch, tokens)
        elif self._is_continued(asked.mask):
            return Rows(None, [tokens] * batch)
        else:
            rows = Rows.after(cache, asked.mask, batch, tokens)
        if rows.hidden is None:
            self._agrees(asked.mask)
        known = None if cache is None or cache.padding is None else cache.padding_of(asked.past)
        if self._window is not None and (rows.padding is not None or known is not None):
            past = asked.given.new_zeros(batch, asked.past, dtype=torch.bool) if known is None else known
            new = asked.given.new_zeros(batch, tokens, dtype=torch.bool) if rows.padding is None else rows.padding
            live = ~torch.cat((past, new), dim=1)
            check_window(live, self._window, live.shape[1] if cache is None else cache.shape.capacity)
        return rows

    def _prepare_growing(self, asked: Pass, cache: Cache | None, use_cache: bool) -> Prepared:
        """Over the stock growing cache."""
        positions = self.model.rotary.positions
        if asked.mask is not None and asked.looked_into:
            arguments.check_mask_values(asked.mask)
        longest = arguments.live_tokens(asked.mask, asked.total, positions)
        seen = asked.position_ids if asked.looked_into or asked.total > positions else None
        arguments.check_positions(positions, longest, seen)
        cache = growing_cache() if cache is None and use_cache else cache
        padded = asked.total if asked.position_ids is None else 0
        self._prepare_rotary(asked.given.device, asked.total, cache, seen, padded)
        run = partial(
            self._forward_growing, asked.given, asked.mask, asked.position_ids, cache, asked.wanted, asked.record
        )
        return Prepared(run, cache)

    def _forward_fixed(self, asked: Pass, rows: Rows, cache: FixedKVCache | None) -> torch.Tensor:
        """Compact the rows, run the step, undo the order. See qwen2_npu.models.inputs."""
        given, position_ids, wanted, record = asked.given, asked.position_ids, asked.wanted, asked.record
        batch, tokens = given.shape[:2]
        if position_ids is None:
            position_ids = positions_after(asked.past, tokens, batch, given.device)
        position_ids = rows.compact(position_ids)
        compact, length = rows.compact(given), tokens
        compiled = self.compiled_steps if cache is not None and record is None else {}
        if "prefill" in compiled and cache is not None and max(cache.lengths) == 0:
            # Prompts of one bucket share one graph; what is added comes after every live token and is overwritten.
            length = round_prompt(tokens, cache.shape.capacity)
            compact, position_ids = pad_tokens(compact, length), pad_tokens(position_ids, length)
        caches: list[Any] = [None] * len(self.model.layers)
        if cache is not None:
            caches = list(zip(cache.key_cache, cache.value_cache, strict=True))
        step = fixed_cache_step(cache, rows, tokens, length, position_ids, self._masks, given.device)
        with step as (phase, inputs):
            index = None if wanted is None or phase == "decode" else rows.find(wanted, tokens, given.device)
            if phase in compiled:
                arguments = (compact, inputs, caches) if phase == "decode" else (compact, inputs, caches, index)
                logits = compiled[phase](*arguments)
            else:
                logits = self._kept_logits(compact, phase, inputs, caches, index, record)
        if record is not None:
            record[0][:] = [rows.restore(hidden) for hidden in record[0]]
        if index is not None:
            return logits
        restored = rows.restore(logits[:, :tokens])
        return restored if wanted is None else restored[:, wanted]  # of a decode step: its one position, or none

    def _forward_growing(
        self,
        given: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        wanted: slice | torch.Tensor | None,
        record: Record | None,
    ) -> torch.Tensor:
        """Padded rows and the stock growing cache, masked as the stock model does."""
        tokens = given.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = positions_after(past, tokens, 1, given.device)
        mask, sliding = self._masks.growing(attention_mask, tokens, past, given.device)
        inputs = AttentionInputs(position_ids, None, mask, sliding)
        hidden_states = self.model(
            given, "prefill" if past == 0 else "extend", inputs, [cache] * len(self.model.layers), record
        )
        return self._logits(hidden_states if wanted is None else hidden_states[:, wanted], None)
