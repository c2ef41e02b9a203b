"""What users and transformers' own test classes do with a causal model, as functions of the model alone.

Each returns what it found: tensors, numbers, names, nested as it likes. ``test_as_stock_model.py`` holds what this
project's model answers against what the stock model does. Models are in float32, on small random weights.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qwen2_npu.compat import CACHE_NAME, IS_V4, cache_of

VOCABULARY, EOS = 199, 7


@dataclass(frozen=True)
class Scenario:
    """One thing that is done.

    Attributes:
        run: with a model on any device.
        from_v5: transformers 4.37.0 does not offer it, or fails with the stock model.
        refused: part of the message where this project's model refuses it; empty where it must answer as stock does.
        by_fixed_cache: it refuses it only with ``fixed_kv_cache`` on.
    """

    run: Callable[[Any], Any]
    from_v5: bool = False
    refused: str = ""
    by_fixed_cache: bool = False


SCENARIOS: dict[str, Scenario] = {}


def scenario(**properties: Any) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def register(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        SCENARIOS[run.__name__] = Scenario(run, **properties)
        return run

    return register


def prompt(model: Any, *, left: bool = True) -> dict[str, torch.Tensor]:
    """Three rows of 11 tokens, two of them padded."""
    ids = torch.randint(8, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    padding = [slice(0, 4), slice(0, 7)] if left else [slice(7, None), slice(4, None)]
    for row, place in enumerate(padding, start=1):
        mask[row, place], ids[row, place] = 0, 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def one_row(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor[:1] for name, tensor in prompt(model).items()}


def live(model: Any, logits: torch.Tensor, *, left: bool = True) -> torch.Tensor:
    """Of the positions that are not padding."""
    return logits[prompt(model, left=left)["attention_mask"].bool()]


# ---- the forward pass ------------------------------------------------------------------------------------------------
@scenario()
def logits_of_a_padded_batch(model: Any) -> Any:
    return [live(model, model(**prompt(model, left=left)).logits, left=left) for left in (True, False)]


@scenario()
def the_same_twice(model: Any) -> Any:
    first, second = (model(**one_row(model)).logits for _ in range(2))
    assert torch.equal(first, second)
    return first


@scenario()
def tuples(model: Any) -> Any:
    return [model(**one_row(model), return_dict=False, use_cache=cached)[0] for cached in (True, False)]


@scenario()
def hidden_states(model: Any) -> Any:
    found = model(**one_row(model), output_hidden_states=True).hidden_states
    return [len(found), *found]


@scenario(refused="output_attentions=True", by_fixed_cache=True)
def attention_weights(model: Any) -> Any:
    found = model(**one_row(model), output_attentions=True).attentions
    return [len(found), *found]


@scenario()
def the_loss(model: Any) -> Any:
    given = one_row(model)
    labels = given["input_ids"].clone()
    whole = model(**given, labels=labels).loss
    labels[:, :5] = -100
    return [whole.reshape(1), model(**given, labels=labels).loss.reshape(1)]


@scenario()
def embeddings_in_place_of_ids(model: Any) -> Any:
    given = one_row(model)
    embeds = model.get_input_embeddings()(given["input_ids"])
    found = model(inputs_embeds=embeds, attention_mask=given["attention_mask"]).logits
    return [found, model(**given).logits]


@scenario()
def positions_of_the_caller(model: Any) -> Any:
    packed = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]], device=model.device)
    return model(**one_row(model), position_ids=packed).logits


@scenario(from_v5=True)
def positions_beyond_the_tokens(model: Any) -> Any:
    return model(**one_row(model), position_ids=torch.arange(11, device=model.device)[None] + 5).logits


@scenario()
def prefill_then_steps(model: Any) -> Any:
    given = one_row(model)
    ids = given["input_ids"]
    output = model(input_ids=ids[:, :6], use_cache=True)
    found = [output.logits]
    for token in range(6, 11):
        output = model(input_ids=ids[:, token : token + 1], use_cache=True, **{CACHE_NAME: cache_of(output)})
        found.append(output.logits)
    return [torch.cat(found, 1), model(input_ids=ids).logits]


@scenario()
def a_continuation_of_several_tokens(model: Any) -> Any:
    given = prompt(model)
    ids, mask = given["input_ids"], given["attention_mask"]
    first = model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
    second = model(input_ids=ids[:, 8:], attention_mask=mask, use_cache=True, **{CACHE_NAME: cache_of(first)})
    return second.logits


@scenario()
def one_token(model: Any) -> Any:
    return model(input_ids=torch.tensor([[9]], device=model.device)).logits


# ---- the module ------------------------------------------------------------------------------------------------------
@scenario()
def what_it_says_of_itself(model: Any) -> Any:
    config = model.config
    return [
        str(model.dtype), model.main_input_name, model.base_model_prefix, model.can_generate(), model.training,
        config.model_type, config.vocab_size, config.num_hidden_layers, config.is_encoder_decoder,
        model.num_parameters(), model.generation_config.eos_token_id, model.get_input_embeddings().weight.shape,
        model.get_output_embeddings().weight.shape, model.config_class.__name__,
    ]  # fmt: skip


@scenario()
def a_deep_copy(model: Any) -> Any:
    return copy.deepcopy(model)(**one_row(model)).logits


@scenario()
def saved_and_loaded(model: Any) -> Any:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        own = type(model).from_pretrained(folder).to(model.device)
        names = sorted(path.name for path in Path(folder).iterdir())
        return [own(**one_row(model)).logits, names]


@scenario()
def saved_by_ours_and_loaded_by_stock(model: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stock = AutoModelForCausalLM.from_pretrained(folder)
        return [stock(**one_row(stock)).logits, str(stock.dtype)]


@scenario()
def the_state_dict_of_itself(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    missing = other.load_state_dict(model.state_dict())
    return [other(**one_row(model)).logits, list(missing.missing_keys)]


@scenario()
def the_state_dict_in_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other(**one_row(model)).logits


@scenario()
def more_and_fewer_tokens(model: Any) -> Any:
    own, given = copy.deepcopy(model), one_row(model)
    with torch.no_grad():
        torch.manual_seed(0)
        own.resize_token_embeddings(VOCABULARY + 9)
        larger = own(**given).logits[..., :VOCABULARY]
        own.resize_token_embeddings(150)
        fewer = own(input_ids=given["input_ids"] % 150).logits
    return [larger, fewer, own.config.vocab_size]


@scenario()
def other_embeddings(model: Any) -> Any:
    own = copy.deepcopy(model)
    other = torch.nn.Embedding(VOCABULARY, model.config.hidden_size)
    other.weight.data = model.get_input_embeddings().weight.data.flip(0)
    own.set_input_embeddings(other)
    return own(**one_row(model)).logits


@scenario()
def in_another_dtype(model: Any) -> Any:
    own = copy.deepcopy(model).to(torch.bfloat16)
    return [str(own.dtype), own(**one_row(model)).logits.shape]


@scenario()
def a_hook_on_the_head(model: Any) -> Any:
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    try:
        model(**one_row(model))
    finally:
        handle.remove()
    return seen[0][:, -1:]


# ---- generate --------------------------------------------------------------------------------------------------------
def generated(name: str, *, from_v5: bool = False, refused: str = "", rows: int = 3, **options: Any) -> None:
    """A scenario: ``generate`` with these options."""

    def run(model: Any) -> Any:
        given = prompt(model) if rows > 1 else one_row(model)
        torch.manual_seed(5)
        return model.generate(**given, **({"max_new_tokens": 6, "pad_token_id": 0} | options)).tolist()

    SCENARIOS[f"generate {name}"] = Scenario(run, from_v5, refused)


generated("greedily")
generated("one token", max_new_tokens=1)
generated("to a length", max_new_tokens=None, max_length=15)
generated("at least so many", min_new_tokens=4, eos_token_id=list(range(100)))
generated("to an end", eos_token_id=list(range(90)))
generated("by sampling", do_sample=True)
generated("by sampling with top k, top p and temperature", do_sample=True, top_k=20, top_p=0.9, temperature=0.7)
generated("by typical sampling", do_sample=True, typical_p=0.9)
generated("by sampling with cutoffs", do_sample=True, epsilon_cutoff=3e-3, eta_cutoff=3e-3)
generated("by sampling with min p", from_v5=True, do_sample=True, min_p=0.1)
generated("several sequences", do_sample=True, num_return_sequences=3)
generated("with beams", num_beams=3, num_return_sequences=2)
generated("with beams, sampled", num_beams=3, do_sample=True)
generated("with beams, stopping early", num_beams=3, early_stopping=True, length_penalty=0.5, eos_token_id=[EOS, 9, 33])
generated("without a cache", use_cache=False)
generated("with beams and without a cache", num_beams=2, use_cache=False)
generated("without repetition", repetition_penalty=1.5, no_repeat_ngram_size=2)
generated("without bad words", bad_words_ids=[[11], [12, 13]], suppress_tokens=[50, 51], begin_suppress_tokens=[60])
generated("with a bias", sequence_bias={(17,): 5.0, (21, 22): -3.0})
generated("with a forced end", forced_eos_token_id=EOS, eos_token_id=EOS)
generated("with a length penalty that grows", exponential_decay_length_penalty=(2, 1.5), eos_token_id=EOS)
generated("with guidance", rows=1, guidance_scale=1.5)
generated("by prompt lookup", from_v5=True, rows=1, prompt_lookup_num_tokens=3, max_new_tokens=12)
generated("in chunks", from_v5=True, rows=1, prefill_chunk_size=4)
generated("in chunks, padded", from_v5=True, refused="prefill_chunk_size=4 with padded rows", prefill_chunk_size=4)
generated("with a watermark", from_v5=True, rows=1, watermarking_config={"bias": 2.5, "seeding_scheme": "lefthash"})
generated(
    "renormalised, with every score", from_v5=True, renormalize_logits=True, remove_invalid_values=True, num_beams=2
)


@scenario()
def generate_with_a_configuration(model: Any) -> Any:
    wanted = GenerationConfig(max_new_tokens=5, num_beams=2, pad_token_id=0, eos_token_id=EOS)
    return model.generate(**prompt(model), generation_config=wanted).tolist()


@scenario()
def generate_positionally(model: Any) -> Any:
    return model.generate(one_row(model)["input_ids"], max_new_tokens=4, pad_token_id=0).tolist()


@scenario()
def generate_a_dictionary(model: Any) -> Any:
    found = model.generate(
        **prompt(model), max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True, output_scores=True
    )
    probabilities = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    return [found.sequences.tolist(), list(found.scores), probabilities, cache_of(found) is not None or IS_V4]


@scenario(from_v5=True)
def generate_with_logits(model: Any) -> Any:
    found = model.generate(
        **prompt(model), max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    return list(found.logits)


@scenario()
def generate_with_hidden_states(model: Any) -> Any:
    found = model.generate(
        **one_row(model), max_new_tokens=3, pad_token_id=0, return_dict_in_generate=True, output_hidden_states=True
    )
    return [[layer[:, -1] for layer in step] for step in found.hidden_states]


@scenario()
def generate_from_nothing(model: Any) -> Any:
    return model.generate(bos_token_id=5, max_new_tokens=5, pad_token_id=0).tolist()


@scenario(from_v5=True)
def generate_from_embeddings(model: Any) -> Any:
    given = one_row(model)
    embeds = model.get_input_embeddings()(given["input_ids"])
    alone = model.generate(inputs_embeds=embeds, max_new_tokens=5, pad_token_id=0)
    return [alone.tolist(), model.generate(**given, inputs_embeds=embeds, max_new_tokens=5, pad_token_id=0).tolist()]


class Later(LogitsProcessor):
    """The most likely token but one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(scores == scores.max(-1, keepdim=True).values, -1e9)


class Until(StoppingCriteria):
    """A length."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> Any:
        done = input_ids.shape[1] >= 14
        return done if IS_V4 else torch.full((input_ids.shape[0],), done, device=input_ids.device)


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.said: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.said.append(value.tolist())

    def end(self) -> None:
        self.said.append("end")


@scenario()
def generate_with_the_caller_s_objects(model: Any) -> Any:
    heard = Heard()
    found = model.generate(
        **one_row(model),
        max_new_tokens=9,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([Later()]),
        stopping_criteria=StoppingCriteriaList([Until()]),
        prefix_allowed_tokens_fn=lambda row, ids: list(range(20, 180)),
        streamer=heard,
    )
    return [found.tolist(), heard.said]


@scenario(from_v5=True)
def generate_on_from_a_cache(model: Any) -> Any:
    given = prompt(model)
    first = model.generate(**given, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True)
    mask = torch.cat([given["attention_mask"], torch.ones(3, 4, dtype=torch.long, device=model.device)], 1)
    more = {CACHE_NAME: cache_of(first), "attention_mask": mask, "pad_token_id": 0}
    return model.generate(first.sequences, max_new_tokens=4, **more).tolist()


@scenario(from_v5=True)
def generate_with_an_assistant(model: Any) -> Any:
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(assistant.parameters())).mul_(1.01)
    return model.generate(**one_row(model), assistant_model=assistant, max_new_tokens=9, pad_token_id=0).tolist()


@scenario()
def generate_after_another_call(model: Any) -> Any:
    """Nothing of one call is left in the next."""
    found = []
    for rows in (3, 1, 3, 2):
        given = {name: tensor[:rows] for name, tensor in prompt(model).items()}
        found.append(model.generate(**given, max_new_tokens=5, pad_token_id=0).tolist())
    return found


@scenario()
def a_loop_of_the_caller(model: Any) -> Any:
    """Greedy, written by hand: the whole sequence first, then its last token."""
    given = one_row(model)
    ids, past = given["input_ids"], None
    for _ in range(5):
        new = ids if past is None else ids[:, -1:]
        output = model(input_ids=new, use_cache=True, **{CACHE_NAME: past})
        past = cache_of(output)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
    return ids.tolist()
