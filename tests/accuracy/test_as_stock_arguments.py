"""Every argument of the stock class's ``forward`` and ``generate`` is honoured as by it, or refused; none is dropped.

The tables below list them all, for both versions of transformers. An argument of the installed version that is in no
table fails the suite until somebody has said what it does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers import Qwen2ForCausalLM as StockQwen2
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.conformance import tiny
from qwen2_npu.errors import UnsupportedError
from tests.unit.small import V4, small_config, small_stock, stock_weights

TOLERANCE = 2e-4  # as in tests/unit/models/test_qwen2.py
IDS = torch.randint(1, 199, (2, 6), generator=torch.Generator().manual_seed(1))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
COUNTED = (LEFT.cumsum(1) - 1).clamp(min=0)
NONE, ALL = Optimizations.none(), Optimizations.all()
PRIVATE_OF_STOCK = ("transformers_version", "generation_kwargs")
"""What a GenerationConfig keeps beside options: the release that wrote it, and names that it did not know."""


@dataclass(frozen=True)
class Row:
    """What one argument does.

    Attributes:
        value: what it is given, or a function of the model that makes it.
        base: arguments that it is given with; None takes one away.
        effect: whether it changes what the stock model returns; a value that changes nothing shows nothing. False where
            the stock model makes nothing of it, or nothing that a caller sees.
        raises: whether the stock model refuses it, too; then ours raises the same class.
        served: whether ours makes sense of it nevertheless.
        refused: the error of this model, by the name of the switches.
        rows: how many rows of the prompt.
    """

    value: Any
    base: Mapping[str, Any] = field(default_factory=dict)
    effect: bool = True
    raises: bool = False
    served: bool = False
    refused: Mapping[str, tuple[type[Exception], str]] = field(default_factory=dict)
    rows: int = 2


def both(error: type[Exception], message: str) -> dict[str, tuple[type[Exception], str]]:
    return {"none": (error, message), "all": (error, message)}


def no_such(name: str) -> dict[str, tuple[type[Exception], str]]:
    return both(TypeError, rf"^Qwen2ForCausalLM.forward\(\) takes no argument {name}")


def given(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    function.of_model = True  # type: ignore[attr-defined]
    return function


def prefilled(model: Any) -> Any:
    cache = model.allocate_cache(2, 16) if isinstance(model, Qwen2ForCausalLM) else DynamicCache()
    with torch.no_grad():
        model(IDS[:, :4], use_cache=True, **{CACHE_NAME: cache})
    return cache


def embedded(model: Any) -> torch.Tensor:
    return stock_model().get_input_embeddings()(IDS).detach()


NO_WEIGHTS = {"all": (UnsupportedError, r"^output_attentions=True: with .* on, attention weights are not kept")}

FORWARD: dict[str, Row] = {
    "input_ids": Row(IDS.flip(0)),
    "attention_mask": Row(LEFT),
    "position_ids": Row(torch.tensor([[0, 1, 1, 2, 3, 5]])),
    "past_key_values": Row(given(prefilled)),
    "cache": Row(given(prefilled)),
    "inputs_embeds": Row(given(lambda model: embedded(model).flip(0)), {"input_ids": None}),
    "labels": Row(IDS),
    "use_cache": Row(False),
    "output_attentions": Row(True, refused=NO_WEIGHTS),
    "output_hidden_states": Row(True),
    "return_dict": Row(False),
    "logits_to_keep": Row(2),
    "num_items_in_batch": Row(3, {"labels": IDS}, refused=no_such("num_items_in_batch")),
    "output_router_logits": Row(True, effect=False, refused=no_such("output_router_logits")),
    "is_causal": Row(False, effect=False, refused=no_such("is_causal")),
    **{
        name: Row(value, effect=False, refused=no_such(name))
        for name, value in {
            "cu_seq_lens_q": torch.tensor([0, 3, 6]), "cu_seq_lens_k": torch.tensor([0, 3, 6]), "max_length_q": 3,
            "max_length_k": 3, "seq_idx": torch.zeros(2, 6, dtype=torch.int32),
        }.items()
    },
}  # fmt: skip


class StopAfter(StoppingCriteria):
    """Stop at eight tokens; the answer's shape differs between versions."""

    def __call__(self, input_ids, scores, **kwargs):
        done = input_ids.shape[1] >= 8
        return done if V4 else torch.full((input_ids.shape[0],), done)


class Collect(BaseStreamer):
    """Keeps what it is given, for the comparison."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.tokens.append(-1)


def mirrored(input_ids, scores):
    """A processor of logits, as a caller may write one."""
    return scores.flip(1)


def of_sampling(name: str, value: Any) -> dict[str, Row]:
    return {name: Row(value, {"do_sample": True})}


def first_tokens(model: Any) -> list[int]:
    """The first two of each row."""
    return stock_model().generate(IDS, max_new_tokens=2, do_sample=False)[:, 6:].flatten().tolist()


@functools.cache
def stock_model() -> Any:
    return small_stock(small_config(num_hidden_layers=2))


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.path())


def stop_string(model: Any) -> list[str]:
    own, answer = tokenizer(), stock_model().generate(IDS[:1], max_new_tokens=5, do_sample=False)[0, 7:].tolist()
    return [next(text for text in map(own.decode, answer) if text.isascii() and text.strip())]


def constraints(model: Any) -> list[Any]:
    return [transformers.PhrasalConstraint([7])] if V4 else []


def reversed_prompt(model, input_ids, **others):
    return input_ids.flip(1)


ENDS = {"eos_token_id": given(lambda model: first_tokens(model)[1])}
"""One row ends early."""
IN_DICT = {"return_dict_in_generate": True}
ASSISTED = {"assistant_model": given(lambda model: stock_model())}
LOOKUP = {"prompt_lookup_num_tokens": 2}
TUPLES = both(UnsupportedError, r"takes the KV cache apart as transformers 4.37.0 does.*install 'transformers>=5")
OF_TUPLES = {"refused": TUPLES} if V4 else {}
"""4.37.0 has these over tuples alone."""
ON_THE_HUB = {} if V4 else {"raises": True}
"""5.x has moved these out of itself, and refuses them unless code of a hub may run."""
DRAFTS = both(UnsupportedError, r"drafts with layers of the stock model.*take assistant_model=")

GENERATE: dict[str, Row] = {
    # ---- of the signature
    "inputs": Row(IDS.flip(0), {"input_ids": None}),
    "generation_config": Row(GenerationConfig(max_new_tokens=3, pad_token_id=0), {"max_new_tokens": None}),
    "logits_processor": Row(LogitsProcessorList([mirrored])),
    "stopping_criteria": Row(StoppingCriteriaList([StopAfter()])),
    "prefix_allowed_tokens_fn": Row(lambda row, ids: [5, 6, 7]),
    "synced_gpus": Row(False, effect=False),
    "assistant_model": Row(given(lambda model: stock_model()), effect=False, rows=1, **OF_TUPLES),
    "streamer": Row(given(lambda model: Collect()), rows=1),
    "negative_prompt_ids": Row(IDS.flip(1), {"guidance_scale": 3.0}),
    "negative_prompt_attention_mask": Row(LEFT, {"guidance_scale": 3.0, "negative_prompt_ids": IDS.flip(1)}),
    "custom_generate": Row(reversed_prompt),
    # ---- of forward
    "attention_mask": Row(LEFT),
    "position_ids": Row(torch.tensor([[0, 1, 1, 2, 3, 5]] * 2), raises=V4, served=V4),
    "past_key_values": Row(given(prefilled), effect=False),
    "cache": Row(given(prefilled), effect=False),
    "inputs_embeds": Row(given(lambda model: embedded(model).flip(0)), {"input_ids": None, "bos_token_id": 1}),
    "logits_to_keep": Row(3, effect=False),
    # ---- how long
    "max_length": Row(8, {"max_new_tokens": None}),
    "max_new_tokens": Row(2),
    "min_length": Row(9, ENDS),
    "min_new_tokens": Row(3, ENDS),
    "early_stopping": Row(True, {"num_beams": 3, **ENDS}, effect=False),
    "max_time": Row(1e-9),
    "stop_strings": Row(given(stop_string), {"tokenizer": given(lambda model: tokenizer())}, rows=1),
    # ---- which strategy
    "do_sample": Row(True),
    "num_beams": Row(3),
    "num_beam_groups": Row(2, {"num_beams": 4, "diversity_penalty": 1.0}, effect=False, **ON_THE_HUB),
    "penalty_alpha": Row(0.6, {"top_k": 4}, **(OF_TUPLES or ON_THE_HUB)),
    "dola_layers": Row("low", **ON_THE_HUB),
    "low_memory": Row(True, effect=False),
    "constraints": Row(given(constraints), {"num_beams": 3}, **ON_THE_HUB),
    "force_words_ids": Row([[7]], {"num_beams": 3}, **ON_THE_HUB),
    "num_return_sequences": Row(2, {"num_beams": 2}),
    "use_cache": Row(False, effect=False),
    # ---- the logits
    **of_sampling("temperature", 0.1),
    **of_sampling("top_k", 2),
    **of_sampling("top_p", 0.3),
    **of_sampling("min_p", 0.6),
    **of_sampling("top_h", 0.2),
    **of_sampling("typical_p", 0.2),
    **of_sampling("epsilon_cutoff", 0.2),
    **of_sampling("eta_cutoff", 0.2),
    "diversity_penalty": Row(5.0, {"num_beams": 4, "num_beam_groups": 2}, effect=False, **ON_THE_HUB),
    "repetition_penalty": Row(9.0),
    "encoder_repetition_penalty": Row(9.0),
    "length_penalty": Row(-1.0, {"num_beams": 3, **IN_DICT, "output_scores": True}),
    "no_repeat_ngram_size": Row(1),
    "encoder_no_repeat_ngram_size": Row(1, effect=False),
    "bad_words_ids": Row(given(lambda model: [[token] for token in first_tokens(model)])),
    "renormalize_logits": Row(True, {"do_sample": True, **IN_DICT, "output_scores": True}),
    "forced_bos_token_id": Row(7, effect=False),
    "forced_eos_token_id": Row(7),
    "forced_decoder_ids": Row([[7, 5]]),
    "remove_invalid_values": Row(True, effect=False),
    "exponential_decay_length_penalty": Row((1, 9.0), {"eos_token_id": 7}),
    "suppress_tokens": Row(given(first_tokens)),
    "begin_suppress_tokens": Row(given(first_tokens)),
    "sequence_bias": Row({(7,): 99.0}),
    "token_healing": Row(True, {"tokenizer": given(lambda model: tokenizer())}, raises=True),  # of this tokenizer
    "guidance_scale": Row(3.0),
    "watermarking_config": Row({"bias": 9.0}),
    # ---- what is returned
    "return_dict_in_generate": Row(True),
    "output_attentions": Row(True, IN_DICT, refused=NO_WEIGHTS),
    "output_hidden_states": Row(True, IN_DICT),
    "output_scores": Row(True, IN_DICT),
    "output_logits": Row(True, IN_DICT),
    # ---- special tokens
    "pad_token_id": Row(9, ENDS),
    "bos_token_id": Row(7, {"input_ids": None}),
    "eos_token_id": Row(ENDS["eos_token_id"]),
    "decoder_start_token_id": Row(7, effect=False),
    # ---- assisted decoding
    "is_assistant": Row(True, raises=True),
    "num_assistant_tokens": Row(2, ASSISTED, effect=False, rows=1, **OF_TUPLES),
    "num_assistant_tokens_schedule": Row("constant", ASSISTED, effect=False, rows=1, **OF_TUPLES),
    "assistant_confidence_threshold": Row(0.9, ASSISTED, effect=False, rows=1),
    "assistant_ensemble_weight": Row(0.5, ASSISTED, effect=False, rows=1),
    "assistant_lookbehind": Row(2, ASSISTED, effect=False, rows=1),
    "target_lookbehind": Row(2, ASSISTED, effect=False, rows=1),
    "prompt_lookup_num_tokens": Row(2, effect=False, rows=1, **OF_TUPLES),
    "max_matching_ngram_size": Row(1, LOOKUP, effect=False, rows=1),
    "assistant_early_exit": Row(1, effect=False, rows=1, refused=DRAFTS),
    "use_mtp": Row(True, rows=1, raises=True, refused=DRAFTS),
    "speculation_type": Row("dflash", ASSISTED, rows=1, raises=True),
    # ---- caches and graphs
    "cache_implementation": Row(
        "dynamic", effect=False,
        refused={"all": (UnsupportedError, r"^cache_implementation='dynamic': .* pass past_key_values=model.allocate")},
    ),
    "cache_config": Row({"nbits": 4}, effect=False),
    "max_cache_len": Row(64, effect=False),
    "compile_config": Row(given(lambda model: transformers.CompileConfig()), effect=False),
    "disable_compile": Row(True, effect=False),
    "prefill_chunk_size": Row(3, effect=False),
    "continuous_batching_config": Row({}, effect=False),
}  # fmt: skip


# ---- the tables are whole
def names_of(function: Any) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name for one in parameters if one.name != "self" and one.kind is not one.VAR_KEYWORD}


def of_forward() -> set[str]:
    if V4:
        return names_of(StockQwen2.forward)
    from transformers.utils.generic import TransformersKwargs

    return names_of(StockQwen2.forward) | set(TransformersKwargs.__optional_keys__)


def of_generate() -> set[str]:
    options = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    # What forward computes of labels, and its switches of outputs, are no part of generate() or options of it.
    of_forward = names_of(StockQwen2.forward) - {"input_ids", "labels", "return_dict"}
    return (names_of(StockQwen2.generate) | options | of_forward) - set(PRIVATE_OF_STOCK)


def test_the_tables_have_every_argument_of_the_installed_version():
    """Of one that is new: add a row, and see what it says."""
    assert of_forward() <= FORWARD.keys()
    assert of_generate() <= GENERATE.keys()


# ---- and true
@pytest.fixture(scope="module")
def stock():
    return stock_model()


@pytest.fixture(scope="module")
def models(stock):
    weights = stock_weights(stock)
    return {
        name: Qwen2ForCausalLM.from_state_dict(stock.config, weights, optimizations=optimizations)
        for name, optimizations in {"none": NONE, "all": ALL}.items()
    }


def call_of(model: Any, arguments: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The arguments as they are, or made for ``model``; of the first rows, where they have rows."""
    made = {name: value(model) if getattr(value, "of_model", False) else value for name, value in arguments.items()}
    return {
        name: value[:rows] if isinstance(value, torch.Tensor) and value.shape[:1] == (2,) else value
        for name, value in made.items()
        if value is not None
    }


def parts_of(value: Any, call: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """All tensors of an output in order, but for caches, whose form is each model's own; and what was streamed."""
    if isinstance(value, torch.Tensor):
        live = call.get("attention_mask")
        at_padding = live is not None and value.is_floating_point() and value.shape[:2] == live.shape
        yield value[live.bool()] if at_padding else value
    elif isinstance(value, Mapping):
        for name in value:
            yield from [torch.ones(1)] if name == CACHE_NAME else parts_of(value[name], call)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from parts_of(one, call)
    if "streamer" in call and isinstance(value, torch.Tensor):
        yield torch.tensor(call["streamer"].tokens)


def answer(function: Callable[..., Any], call: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(3)
    with torch.no_grad():
        output = function(**call)
    if isinstance(output, tuple):  # 4.37.0's caches are tuples of tuples
        output = [one for one in output if not isinstance(one, Cache) and not isinstance(one[0], tuple)]
    return list(parts_of(output, call))


def alike(mine: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(mine) == len(other) and all(
        one.shape == two.shape and torch.allclose(one.double(), two.double(), rtol=0, atol=TOLERANCE)
        for one, two in zip(mine, other, strict=True)
    )


def check(row: Row, name: str, plain: Mapping[str, Any], stock: Any, models: Mapping[str, Any], method: str) -> None:
    without = {**plain, **{name: value for name, value in row.base.items() if value is not None}}
    arguments = {**plain, **row.base, name: row.value}
    ask = lambda model, call: answer(getattr(model, method), call_of(model, call, row.rows))  # noqa: E731
    expected, error = None, None
    try:
        expected = ask(stock, arguments)
    except Exception as raised:  # whatever it is, ours is held against it
        error = raised
    untouched = set(row.refused) == set(models)
    assert (error is not None) == row.raises or untouched, f"the stock model: {error!r}"
    if row.effect and expected is not None:
        assert not alike(expected, ask(stock, without)), f"{name}={row.value!r} changes nothing"
    for switches, model in models.items():
        if switches in row.refused:
            kind, message = row.refused[switches]
            with pytest.raises(kind, match=message):
                ask(model, arguments)
        elif row.served:
            ask(model, arguments)
        elif error is not None:
            with pytest.raises(type(error)):
                ask(model, arguments)
        else:
            assert alike(ask(model, arguments), expected), switches


@pytest.mark.parametrize("name", sorted(FORWARD.keys() & of_forward()))
def test_forward(name, stock, models):
    check(FORWARD[name], name, {"input_ids": IDS}, stock, models, "forward")


@pytest.mark.parametrize("name", sorted(GENERATE.keys() & of_generate()))
def test_generate(name, stock, models):
    plain = {"input_ids": IDS, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    check(GENERATE[name], name, plain, stock, models, "generate")
