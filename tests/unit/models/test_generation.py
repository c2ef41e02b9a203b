"""``generate``: transformers' own, with all its options, over the fixed cache."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.cache import CAPACITY_BUCKET, FixedKVCache
from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.conformance import tiny
from qwen2_npu.errors import CacheOverflowError, UnsupportedError
from qwen2_npu.models.generation import CachePool
from tests.unit.small import V4, small_config, small_stock, stock_weights
from tests.unit.tokens import assert_same_tokens


@pytest.fixture(scope="module")
def stock():
    return small_stock()


@pytest.fixture(scope="module", params=["none", "fixed_kv_cache", "all"])
def model(request, stock):
    optimizations = {
        "none": Optimizations.none(),
        "fixed_kv_cache": Optimizations.only("fixed_kv_cache"),
        "all": Optimizations.all(),
    }[request.param]
    return Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)


@pytest.fixture(scope="module")
def full(stock):
    return Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock))


@pytest.fixture(scope="module")
def prompt():
    ids = torch.randint(1, 199, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


class StopAfter(StoppingCriteria):
    """Stop at a length; the answer's shape differs between versions."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        done = input_ids.shape[1] >= self.length
        return done if V4 else torch.full((input_ids.shape[0],), done)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"do_sample": True, "top_p": 0.8, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 3},
        {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"do_sample": False, "min_new_tokens": 4, "eos_token_id": 7},
        {"do_sample": False, "use_cache": False},
    ],
    ids=lambda options: (
        ",".join(f"{name}={value}" for name, value in options.items() if name != "do_sample") or "greedy"
    ),
)
def test_options_give_the_stock_tokens(model, stock, prompt, options):
    answers = []
    for candidate in (stock, model):
        torch.manual_seed(5)
        answers.append(candidate.generate(**prompt, max_new_tokens=10, pad_token_id=0, **options))
    assert_same_tokens(answers[1], answers[0])


def test_stopping_criteria_and_streamer(model, stock, prompt):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    row = {name: tensor[:1] for name, tensor in prompt.items()}
    answers, streamers = [], []
    for candidate in (stock, model):
        streamers.append(Collect())
        criteria = StoppingCriteriaList([StopAfter(15)])
        answers.append(candidate.generate(**row, max_new_tokens=20, do_sample=False, stopping_criteria=criteria,
                                          streamer=streamers[-1]))  # fmt: skip
    assert_same_tokens(answers[1], answers[0])
    assert answers[0].shape[1] == 15
    assert streamers[0].tokens == streamers[1].tokens
    assert streamers[1].ended


def test_embeddings_as_prompt(model, stock, prompt):
    embeds = stock.get_input_embeddings()(prompt["input_ids"]).detach()
    # 4.37.0 asks for a bos_token_id, though it does not use it.
    arguments = {"attention_mask": prompt["attention_mask"], "max_new_tokens": 8, "do_sample": False, "bos_token_id": 1}
    theirs = stock.generate(inputs_embeds=embeds, **arguments)
    assert_same_tokens(model.generate(inputs_embeds=embeds, **arguments), theirs)


def test_without_a_mask(model, stock, prompt):
    ids = prompt["input_ids"]
    theirs = stock.generate(ids, max_new_tokens=8, do_sample=False)
    assert_same_tokens(model.generate(ids, max_new_tokens=8, do_sample=False), theirs, stock)


@pytest.mark.skipif(V4, reason="4.37.0's generate does not continue from a Cache object")
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_second_turn_from_the_cache_of_the_first(model, stock, prompt, name):
    """Under either name of the cache, whatever the installed transformers calls it."""
    arguments = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 6}
    more = torch.randint(1, 199, (3, 5), generator=torch.Generator().manual_seed(4))
    answers = []
    own = model.allocate_cache(3, 64)
    for candidate, key, extra in ((stock, CACHE_NAME, {}), (model, name, {name: own})):
        first = candidate.generate(**prompt, **arguments, **extra)
        assert candidate is stock or cache_of(first) is own
        ids = torch.cat([first.sequences, more], dim=1)
        mask = torch.cat([prompt["attention_mask"], torch.ones(3, 11, dtype=torch.int64)], dim=1)
        second = candidate.generate(ids, attention_mask=mask, **{key: cache_of(first)}, **arguments)
        answers.append(second.sequences)
    assert_same_tokens(answers[1], answers[0])


@pytest.mark.skipif(V4, reason="4.37.0 crops tuples only")
def test_assisted_decoding_crops_the_cache(full, stock, prompt):
    ids = prompt["input_ids"][:1]
    answer = full.generate(ids, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)
    assert_same_tokens(answer, stock.generate(ids, max_new_tokens=10, do_sample=False), stock)


# ---- the cache between calls
# ------------------------------------------------------------------------------------------
def test_the_next_call_of_the_same_shape_gets_the_same_memory(full, prompt, monkeypatch):
    full.generate(**prompt, max_new_tokens=4, do_sample=False)
    built = []
    original = FixedKVCache.__init__
    monkeypatch.setattr(FixedKVCache, "__init__", lambda self, shape: (built.append(shape), original(self, shape))[1])
    first = full.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert_same_tokens(first, full.generate(**prompt, max_new_tokens=4, do_sample=False))
    assert built == []
    full.generate(prompt["input_ids"][:1], max_new_tokens=4, do_sample=False)
    assert [shape.batch_size for shape in built] == [1]


def test_a_cache_the_caller_keeps_is_never_handed_out_again(full, prompt):
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    kept = cache_of(full.generate(**prompt, **arguments))
    contents = [tensor.clone() for tensor in kept.key_cache]
    assert cache_of(full.generate(**prompt, **arguments)) is not kept
    assert all(torch.equal(old, new) for old, new in zip(contents, kept.key_cache, strict=True))


def test_one_idle_cache_is_kept_at_most(full):
    """Of calls at the same time, each of which gives its own back."""
    caches = [full.allocate_cache(1, 64) for _ in range(3)]
    for cache in caches:
        full._pool.give_back(cache)
    assert full._pool.take(caches[2].shape) is caches[2]
    assert full._pool.take(caches[2].shape) not in caches


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"device": torch.device("meta")}, {"layout": "BNSD"},
                                   {"sliding_window": 3}, {"batch_size": 2}, {"capacity": 256}, {"kv_heads": 4},
                                   {"head_dim": 32}, {"layers": 1}], ids=lambda other: next(iter(other)))  # fmt: skip
def test_the_idle_cache_is_handed_out_for_an_equal_shape_alone(full, other):
    """The model may have become another one since: half(), to()."""
    pool, shape = CachePool(), full.cache_shape(1, 64)
    for wanted in (replace(shape, **other), shape):
        pool.give_back(FixedKVCache(shape if wanted is not shape else replace(shape, **other)))
        assert pool.take(wanted).shape == wanted
        assert pool.idle is None  # freed: there is no room for two


def test_generate_computes_the_logits_of_a_prompt_s_last_position_where_the_switch_says_so(model, prompt):
    rows = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // args[0].shape[-1]))
    model.generate(**prompt, max_new_tokens=2, do_sample=False)
    hook.remove()
    assert rows == [3 if model.optimizations.last_token_logits else 3 * 11, 3]


def test_capacity_comes_from_the_prompt_and_the_new_tokens(full, prompt):
    arguments = {"do_sample": False, "return_dict_in_generate": True}
    cache = cache_of(full.generate(**prompt, max_new_tokens=4, **arguments))
    assert cache.shape.capacity == 128
    cache = cache_of(full.generate(**prompt, max_new_tokens=120, **arguments))
    assert cache.shape.capacity == 256


def test_threads_do_not_share_a_cache(full, prompt):
    """One model, several requests at once: no call gets memory that another still writes."""
    rows = [{name: values[row : row + 1] for name, values in prompt.items()} for row in range(3)]
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    alone = [full.generate(**row, **arguments) for row in rows]

    def repeat(row: int) -> list[torch.Tensor]:
        return [full.generate(**rows[row], **arguments) for _ in range(3)]

    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(repeat, range(3)))
    for row, own in enumerate(answers):
        for count, answer in enumerate(own):
            assert_same_tokens(answer, alone[row], full, rows[row], where=f"thread {row}, call {count}")


def test_a_call_is_not_changed_by_one_of_another_thread(full, prompt):
    """Of two that overlap, the one that began first ends first."""
    began, go_on = Event(), Event()
    seen: list[object] = []

    def wait(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        began.set()
        assert go_on.wait(30)
        return scores

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(full._call())
        go_on.set()
        first.result()
        seen.append(full._call())
        return scores

    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(full.generate, **prompt, max_new_tokens=2, logits_processor=LogitsProcessorList([wait]))
        assert began.wait(30)
        full.generate(**prompt, max_new_tokens=1, logits_processor=LogitsProcessorList([look]))
    assert seen[0] is seen[1] is not None


def test_inference_mode_leaves_nothing_that_later_calls_cannot_write(stock, prompt):
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock))
    arguments = {**prompt, "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with torch.inference_mode():
        kept = model.generate(**arguments)
        pooled = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert_same_tokens(model.generate(**arguments).sequences, pooled, model, prompt)
    mask = torch.cat((prompt["attention_mask"], torch.ones(3, 4, dtype=torch.int64)), dim=1)
    with torch.no_grad():
        model(pooled[:, -1:], attention_mask=mask, **{CACHE_NAME: cache_of(kept)})


@pytest.mark.skipif(V4, reason="an option of 5.x")
def test_stop_strings(model, stock):
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    ids = torch.randint(1, 199, (1, 6), generator=torch.Generator().manual_seed(5))
    plain = stock.generate(ids, max_new_tokens=20, do_sample=False)
    texts = [tokenizer.decode([token]) for token in plain[0, 8:-4].tolist()]
    stop = next(text for text in texts if text.isascii() and text.strip())
    arguments = {"max_new_tokens": 20, "do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
    answers = [candidate.generate(ids, **arguments) for candidate in (stock, model)]
    assert_same_tokens(answers[1], answers[0])
    assert answers[0].shape[1] < plain.shape[1]


@pytest.mark.skipif(V4, reason="an option of 5.x")
def test_prefill_in_chunks(model, stock, prompt):
    ids = prompt["input_ids"]
    arguments = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 4}
    assert_same_tokens(model.generate(ids, **arguments), stock.generate(ids, **arguments), stock)
    with pytest.raises(UnsupportedError, match="prefill_chunk_size=4 with padded rows"):
        model.generate(**prompt, **arguments)


def test_two_caches_in_one_call_are_refused(full, prompt):
    cache = full.allocate_cache(3, 64)
    with pytest.raises(ValueError, match="two names of one argument"):
        full.generate(**prompt, max_new_tokens=2, cache=cache, past_key_values=cache)


# ---- as many tokens as positions
FEW = 24


@pytest.fixture(scope="module")
def short_stock():
    return small_stock(small_config(num_hidden_layers=1, max_position_embeddings=FEW))


@pytest.fixture(scope="module", params=["swiglu", "fixed_kv_cache", "none"])
def short(request, short_stock):
    optimizations = Optimizations.none() if request.param == "none" else Optimizations.up_to(request.param)
    weights = stock_weights(short_stock)
    return Qwen2ForCausalLM.from_state_dict(short_stock.config, weights, optimizations=optimizations)


def no_forward(model, monkeypatch):
    monkeypatch.setattr(model, "prefill_step", lambda *given: pytest.fail("it was computed"))
    monkeypatch.setattr(model.model, "forward", lambda *given: pytest.fail("it was computed"))


WAYS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "several": {"num_beams": 2, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", [way for way in WAYS if not (V4 and way == "lookup")])
@pytest.mark.parametrize(("width", "new"), [(FEW - 1, 2), (FEW, 1), (FEW - 1, 3), (FEW, 2), (FEW + 1, 1)])
def test_the_last_new_token_takes_no_position(short, short_stock, width, new, way, monkeypatch):
    """The stock model, which stops nowhere, is followed up to the last position; what goes beyond is refused first."""
    ids = torch.randint(1, 199, (1 if way == "lookup" else 2, width), generator=torch.Generator().manual_seed(width))
    call = {"input_ids": ids, "max_new_tokens": new, "do_sample": False, **WAYS[way]}
    followed_up_to_the_last_position(short, short_stock, call, width, monkeypatch)


def followed_up_to_the_last_position(short, short_stock, call, live, monkeypatch):
    """The stock tokens, as many as there are positions for."""
    new = call["max_new_tokens"]
    room = FEW - live + 1
    if new <= room:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".* are generated at most")
            found = short.generate(**call)
        assert_same_tokens(found, short_stock.generate(**call))
        return
    if room > 0:
        with pytest.warns(UserWarning, match=rf"^{new} new tokens after this prompt need {live + new - 1} positions"):
            cut = short.generate(**call)
        assert_same_tokens(cut, short_stock.generate(**{**call, "max_new_tokens": room}))
    no_forward(short, monkeypatch)
    least = max(new, room + 1)
    call = {**call, "max_new_tokens": least, "min_new_tokens": least}
    with pytest.raises(ValueError, match=rf"^prompt and new tokens need {live + least - 1} positions, the model has"):
        short.generate(**call)


@pytest.mark.parametrize("width", [FEW, FEW + 3, FEW + 11])
@pytest.mark.parametrize(("live", "new"), [(FEW - 1, 2), (FEW, 1), (FEW - 1, 3), (FEW, 2)])
def test_padding_takes_no_position(short, short_stock, width, live, new, monkeypatch):
    ids = torch.randint(1, 199, (2, width), generator=torch.Generator().manual_seed(width))
    mask = torch.ones_like(ids)
    mask[0, : width - live] = mask[1, : width - 5] = 0
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": new, "do_sample": False}
    followed_up_to_the_last_position(short, short_stock, call, live, monkeypatch)


@pytest.mark.skipif(V4, reason="4.37.0's generate takes no embeddings without a bos token")
@pytest.mark.parametrize(("width", "new"), [(FEW - 1, 2), (FEW, 1), (FEW, 2)])
def test_embeddings_take_positions_as_ids_do(short, short_stock, width, new, monkeypatch):
    embeds = short_stock.get_input_embeddings()(torch.arange(1, width + 1)[None])
    call = {"inputs_embeds": embeds, "max_new_tokens": new, "do_sample": False}
    followed_up_to_the_last_position(short, short_stock, call, width, monkeypatch)


@pytest.mark.parametrize("way", ["greedy", "no cache", *([] if V4 else ["lookup"])])
def test_a_limit_beyond_all_positions_is_no_obstacle_where_generation_ends_early(short, short_stock, way):
    """As evaluation programs pass it; whichever name the limit goes by."""
    ids = torch.randint(1, 199, (1 if way == "lookup" else 2, 5), generator=torch.Generator().manual_seed(7))
    ends = {"eos_token_id": short_stock.generate(ids, max_new_tokens=6, do_sample=False)[:, -3].tolist()}
    call = {"input_ids": ids, "do_sample": False, "pad_token_id": 0, **ends, **WAYS[way]}
    theirs = short_stock.generate(**call, max_new_tokens=15)
    for limit in ({"max_new_tokens": 32768}, {"max_length": 32768}):
        with pytest.warns(UserWarning, match=r"20 are generated at most"):
            found = short.generate(**call, **limit)
        assert_same_tokens(found, theirs, short_stock)
        if short.optimizations.fixed_kv_cache and way == "greedy":
            assert short._pool.idle.shape.capacity == CAPACITY_BUCKET  # of the positions, not of the limit


@pytest.mark.parametrize("least", [{"min_length": 20 + 5}, {"min_new_tokens": 5}, {"min_length": 20 + 4}], ids=str)
def test_tokens_that_must_be_generated_are_not_cut(short, short_stock, least, monkeypatch):
    """5 after a prompt of 20 end with the last position; of 8 that may be, so many are generated."""
    ids = torch.randint(1, 199, (1, 20), generator=torch.Generator().manual_seed(20))
    call = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    with pytest.warns(
        UserWarning, match=r"^8 new tokens after this prompt need 27 positions.*: 5 are generated at most"
    ):
        found = short.generate(**call, **least)
    assert_same_tokens(found, short_stock.generate(**{**call, "max_new_tokens": 5}))
    no_forward(short, monkeypatch)
    ((name, number),) = least.items()
    with pytest.raises(ValueError, match=r"^prompt and new tokens need 25 positions, the model has"):
        short.generate(**call, **{name: max(number, 25 if name == "min_length" else 5) + 1})


# ---- bad input
# --------------------------------------------------------------------------------------------------------
def test_right_padding_is_refused(model, prompt):
    with pytest.raises(ValueError, match=r"row 1 of the prompt is padded on the right .*padding_side='left'"):
        model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"].flip(1), max_new_tokens=2)


IDS, ONES = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"^input_ids is a list: pass a tensor"),
        ({"inputs": "text"}, r"^input_ids is a str: pass a tensor"),
        ({"input_ids": IDS.float()}, r"^input_ids holds torch.float32: pass torch.int64"),
        ({"input_ids": IDS[0]}, r"^input_ids \(batch, tokens\) expected, got shape \(3,\)"),
        ({"input_ids": IDS[:, :0]}, r"^empty prompt: input_ids"),
        ({"inputs_embeds": torch.ones(2, 256)}, r"^inputs_embeds \(batch, tokens, hidden\) expected"),
        ({"input_ids": IDS, "attention_mask": ONES.tolist()}, r"^attention_mask is a list: pass a tensor"),
        ({"input_ids": IDS, "attention_mask": ONES[:, :2]}, r"^attention_mask covers 2 tokens, but .* 3 are new"),
        ({"input_ids": IDS, "attention_mask": ONES.repeat(1, 2)}, r"^attention_mask covers 6 tokens, but .* 3 are new"),
        ({"input_ids": IDS, "attention_mask": ONES[:1]}, r"^attention_mask of shape \(1, 3\): pass a 2-D mask"),
        ({"input_ids": IDS, "attention_mask": ONES[0]}, r"^attention_mask of shape \(3,\): pass a 2-D mask"),
        ({"input_ids": IDS, "attention_mask": ONES * 2}, r"^attention_mask holds 2: pass 1 for a token and 0"),
        ({"input_ids": IDS, "position_ids": [[0, 1, 2]]}, r"^position_ids is a list: pass a tensor"),
        ({"input_ids": IDS, "past_key_values": "cache"}, r"is a str: pass a cache of allocate_cache"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_before_transformers_meets_it(model, call, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**call, max_new_tokens=2, do_sample=False)


def test_a_cache_too_small_for_the_prompt(full):
    with pytest.raises(CacheOverflowError, match=r"200 new tokens after 0 do not fit the KV cache of 128 slots"):
        full(torch.ones(1, 200, dtype=torch.int64), past_key_values=full.allocate_cache(1, 100), use_cache=True)


def test_token_ids_outside_the_vocabulary(model):
    with pytest.raises(ValueError, match="token id 500 is outside the vocabulary of 199"):
        model.generate(torch.tensor([[1, 500]]), max_new_tokens=2, do_sample=False)


@pytest.mark.skipif(V4, reason="an option of 5.x")
def test_another_cache_implementation_is_refused(full, prompt):
    with pytest.raises(UnsupportedError, match="cache_implementation='static'"):
        full.generate(**prompt, max_new_tokens=2, cache_implementation="static")


def test_a_prompt_that_ends_in_the_pad_token(model):
    """The mask is transformers' own then: nobody has passed one that could end in 0."""
    ids = torch.tensor([[0, 5, 6], [7, 8, 0]])
    with pytest.raises(
        ValueError, match=r"^row 1 of the prompt ends in the pad token 0, .* where no attention_mask is"
    ):
        model.generate(ids, max_new_tokens=2, pad_token_id=0)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, pad_token_id=0)
    assert answer.shape == (2, 5)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_at_once(model, name):
    with pytest.raises(UnsupportedError, match=r"^continuous batching .* one left-padded batch to generate\("):
        getattr(model, name)([[1, 2, 3]], max_new_tokens=2)


@pytest.mark.skipif(V4, reason="an option of 5.x")
@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_cache_implementations_are_refused_with_the_call_that_works(model, prompt, kind):
    with pytest.raises(UnsupportedError, match=rf"^cache_implementation='{kind}': .*=model.allocate_cache\(batch_size"):
        model.generate(**prompt, max_new_tokens=2, cache_implementation=kind)
