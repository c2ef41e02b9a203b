"""Row compaction: any 2-D mask becomes a ragged batch aligned at slot 0, and back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.cache import FixedKVCache
from qwen2_npu.compat import CACHE_NAME, cache_of
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.graph.steps import CompiledStep
from qwen2_npu.models.inputs import MaskFactory, Rows, check_window
from tests.unit.small import V4, small_config, small_stock, stock_weights

masks = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 9).flatmap(
        lambda tokens: st.lists(
            st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens).filter(any), min_size=batch, max_size=batch
        )
    )
)


@given(masks)
def test_live_tokens_come_first_in_their_order_and_go_back(rows):
    mask = torch.tensor(rows)
    batch, tokens = mask.shape
    values = torch.arange(batch * tokens).reshape(batch, tokens)
    compact = Rows.of(mask, batch, tokens)
    moved = compact.compact(values)
    assert compact.lengths == mask.sum(1).tolist()
    for row in range(batch):
        live = values[row][mask[row] == 1]
        assert torch.equal(moved[row, : len(live)], live)
    assert torch.equal(compact.restore(moved), values)
    for wanted in (slice(-1, None), torch.tensor([0, tokens // 2])):
        assert torch.equal(moved.gather(1, compact.find(wanted, tokens, values.device)), values[:, wanted])


def test_no_mask_moves_nothing():
    rows = Rows.of(None, 2, 5)
    assert rows.order is None
    assert rows.find(slice(-2, None), 5, torch.device("cpu")).tolist() == [[3, 4], [3, 4]]


def test_the_compressed_mask_is_made_once_for_a_device_and_outlives_the_call():
    masks = MaskFactory(Optimizations.all(), window=4)
    with torch.inference_mode():
        made, sliding = masks.prefill(3, torch.device("cpu"))
    assert not made.is_inference()
    assert made is sliding
    assert torch.equal(made, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    assert masks.prefill(5, torch.device("cpu"))[0] is made
    assert masks.prefill(5, torch.device("meta"))[0].device.type == "meta"


def test_only_the_new_columns_count():
    assert Rows.of(torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1]]), 2, 2).lengths == [2, 1]


def test_a_row_without_a_live_token_raises():
    with pytest.raises(ValueError, match=r"row 1 of the attention_mask has no live token"):
        Rows.of(torch.tensor([[1, 1], [0, 0]]), 2, 2)


# ---- a step that fails ---------------------------------------------------------------------------------------------
LAYERS = 3
STEPS = {"prefill": 0, "extend": 1, "decode": 2}
LADDER_OF_CACHES = {
    "growing": Optimizations.none(),
    "BNSD": Optimizations.up_to("fixed_kv_cache"),
    "BSND": Optimizations.up_to("flash_attention"),
    "tiling": Optimizations.all(),
}


class Failure(BaseException):
    """Not an Exception, as an interrupt is not."""


@pytest.fixture(scope="module")
def weights():
    """Of three layers, the middle one with a sliding window where there are such."""
    windows = {} if V4 else {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = small_config(num_hidden_layers=LAYERS, **windows)
    return config, stock_weights(small_stock(config))


def state_of(cache) -> list[torch.Tensor]:
    """Everything a later step reads, as copies; slots that are not live, as 0."""
    if isinstance(cache, FixedKVCache):
        accounts = [torch.tensor([*cache.lengths, cache.seen_tokens]), cache.write_index, cache.slots, cache.drop_mask]
        accounts.append(cache.padding_of(cache.seen_tokens))
        sliding = [] if cache.sliding_drop_mask is None else [cache.sliding_drop_mask]
        dead = torch.arange(cache.shape.capacity) >= cache.write_index[:, None]
        dead = dead[:, :, None, None] if cache.shape.layout == "BSND" else dead[:, None, :, None]
        kept = [tensor.masked_fill(dead, 0) for tensor in cache.key_cache + cache.value_cache]
        return [*(tensor.clone() for tensor in (*accounts, *sliding)), *kept]
    layers = cache if V4 else [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]
    return [torch.tensor(cache.get_seq_length()), *(tensor.clone() for layer in layers for tensor in layer)]


def take_steps(model, cache, last: str, arguments: dict[str, torch.Tensor]):
    """Ragged rows through all steps up to ``last``, which is handed back undone."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.arange(1, 19).reshape(2, 9)
    for name, (start, stop) in {"prefill": (0, 5), "extend": (5, 8), "decode": (8, 9)}.items():
        covered = torch.cat((mask, torch.ones(2, stop - 5, dtype=torch.int64)), dim=1)
        arguments |= {"input_ids": ids[:, start:stop], "attention_mask": covered}
        step = partial(model, past_key_values=cache, use_cache=True, **arguments)
        if name == last:
            return step
        step()
    raise AssertionError(last)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("kind", LADDER_OF_CACHES)
@torch.no_grad()
def test_a_step_that_fails_leaves_the_cache_as_it_was(step, layer, kind, weights):
    model = Qwen2ForCausalLM.from_state_dict(*weights, optimizations=LADDER_OF_CACHES[kind]).eval()
    cache = model.allocate_cache(2, 16)
    again = take_steps(model, cache, step, {})
    before = state_of(cache)

    def fail(module, given, output):
        if step == "prefill" and isinstance(cache, FixedKVCache):  # its tokens are not live yet, nor is anything else
            cache.value_cache[layer].fill_(float("nan"))
        raise Failure

    hook = model.model.layers[layer].self_attn.register_forward_hook(fail)
    with pytest.raises(Failure):
        again()
    hook.remove()
    after = state_of(cache)
    assert len(after) == len(before)
    assert all(map(torch.equal, after, before))
    other = model.allocate_cache(2, 16)
    torch.testing.assert_close(again().logits, take_steps(model, other, step, {})().logits, rtol=0, atol=0)


@pytest.mark.parametrize("step", ["prefill", "decode"])
@torch.no_grad()
def test_a_compiled_step_that_fails_leaves_the_cache_as_it_was(step, weights):
    """The graph stops behind the write of each layer in turn."""
    stop_behind = None

    class Stopping(torch.fx.Interpreter):
        writes = 0

        def run_node(self, node):
            result = super().run_node(node)
            self.writes += "scatter_update" in str(node.target)
            self.writes += 2 * ("scatter_pa_kv_cache" in str(node.target))
            if stop_behind is not None and self.writes > 2 * stop_behind:
                raise Failure
            return result

    def compiler(function):
        return torch.compile(function, backend=lambda graph, _: lambda *given: Stopping(graph).run(*given))

    model = Qwen2ForCausalLM.from_state_dict(*weights).eval()
    model.compiled_steps = {
        "prefill": CompiledStep(model.prefill_step, compiler),
        "decode": CompiledStep(model.decode_step, compiler),
    }
    for layer in range(LAYERS):
        cache, other = model.allocate_cache(2, 16), model.allocate_cache(2, 16)
        stop_behind = None
        again = take_steps(model, cache, step, {})
        before = state_of(cache)
        stop_behind = layer
        with pytest.raises(Failure):
            again()
        assert all(map(torch.equal, state_of(cache), before))
        stop_behind = None
        torch.testing.assert_close(again().logits, take_steps(model, other, step, {})().logits, rtol=0, atol=0)


# ---- as many tokens as positions -----------------------------------------------------------------------------------
FEW = 27
"""Positions of the models below: no multiple of anything that capacities and prompts are rounded to."""


@pytest.fixture(scope="module")
def short_stock():
    return small_stock(small_config(num_hidden_layers=1, max_position_embeddings=FEW))


CASES = [(name, mode) for name in ("swiglu", "fixed_kv_cache") for mode in ("eager", "compiled")] + [("none", "eager")]
"""Step of the ladder, and whether steps go through what compile_model puts in place; no compiler is needed."""


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def short(request, short_stock):
    step, mode = request.param
    optimizations = Optimizations.none() if step == "none" else Optimizations.up_to(step)
    weights = stock_weights(short_stock)
    model = Qwen2ForCausalLM.from_state_dict(short_stock.config, weights, optimizations=optimizations)
    if mode == "compiled":
        model.compiled_steps = {"prefill": model.prefill_step, "decode": model.decode_step}
    return model


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def assert_close(ours, theirs, where=None):
    difference = (ours - theirs).abs()
    assert (difference if where is None else difference[where.bool()]).max() < 2e-4  # as in test_qwen2.py


def tokens(rows, width):
    return torch.randint(1, 199, (rows, width), generator=torch.Generator().manual_seed(width))


@torch.no_grad()
@pytest.mark.parametrize("width", [FEW - 1, FEW, FEW + 1])
def test_a_prompt_as_long_as_there_are_positions(short, short_stock, width):
    ids = tokens(2, width)
    if width <= FEW:
        assert_close(short(ids).logits, short_stock(ids).logits)
        assert_close(short(ids, use_cache=False).logits, short_stock(ids).logits)
        return
    with pytest.raises(
        ValueError, match=r"^28 tokens need as many positions, the model has max_position_embeddings=27"
    ):
        short(ids)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [FEW, FEW + 3, FEW + 11])
def test_padding_takes_no_position(short, short_stock, width, side):
    """Whoever counts the positions: this model, the caller as tokenizers do, or the caller with padding at any."""
    ids, mask = tokens(2, width), torch.ones(2, width, dtype=torch.int64)
    mask[0, : width - FEW] = 0
    mask[1, : width - 5] = 0
    mask = mask if side == "left" else mask.flip(1)
    theirs = short_stock(ids, attention_mask=mask, position_ids=positions(mask)).logits
    assert_close(short(ids, attention_mask=mask).logits, theirs, mask)
    counted = mask.cumsum(-1) - 1
    assert_close(short(ids, attention_mask=mask, position_ids=counted).logits, theirs, mask)
    assert_close(short(ids, attention_mask=mask, position_ids=counted + FEW * (1 - mask)).logits, theirs, mask)


@torch.no_grad()
def test_more_live_tokens_than_positions(short):
    ids, mask = tokens(2, FEW + 3), torch.ones(2, FEW + 3, dtype=torch.int64)
    mask[0, :2] = mask[1, :9] = 0
    with pytest.raises(ValueError, match=r"^28 tokens need as many positions"):
        short(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"^(28 tokens need as many positions|position_ids holds 27)"):
        short(ids, attention_mask=mask, position_ids=positions(mask))


@torch.no_grad()
@pytest.mark.parametrize("past", [FEW - 3, FEW - 1])
@pytest.mark.parametrize("new", [1, 2, 3, 4])
def test_a_continuation_up_to_the_last_position(short, short_stock, past, new):
    ids = tokens(2, past + new)
    first = short(ids[:, :past], use_cache=True)
    if past + new <= FEW:
        second = short(ids[:, past:], past_key_values=cache_of(first))
        assert_close(second.logits, short_stock(ids).logits[:, past:])
        return
    with pytest.raises(ValueError, match=rf"^{past + new} tokens need as many positions"):
        short(ids[:, past:], past_key_values=cache_of(first))
    assert cache_of(first).get_seq_length() == past


@pytest.mark.parametrize("mask", [[[0, 0, 1, 1]] * 3, [[1, 1, 0, 0]] * 2, [[0, 1, 0, 1]] * 2], ids=str)
def test_rows_that_are_all_padded_alike_are_compacted(mask):
    """As many tokens in each row are no sign that there is no padding."""
    given = torch.tensor(mask)
    rows = Rows.of(given, len(mask), 4)
    assert rows.lengths == [2] * len(mask)
    assert torch.equal(rows.padding, given == 0)
    places = torch.arange(4).repeat(len(mask), 1)
    compact = rows.compact(places)
    assert torch.equal(compact[:, :2], places[given == 1].reshape(len(mask), 2))
    assert torch.equal(rows.restore(compact), places)
    assert torch.equal(rows.find(slice(-1, None), 4, given.device), (compact == 3).nonzero()[:, 1:])


def test_holes_are_refused_as_soon_as_a_window_can_reach_across():
    live = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]).bool()
    check_window(live, window=5, slots=5)
    check_window(live[:1], window=4, slots=5)
    with pytest.raises(UnsupportedError, match=r"^row 1 has padding between its tokens, .* window of 4"):
        check_window(live, window=4, slots=5)


@pytest.mark.parametrize("step", ["swiglu", "ifa_tiling"])
@torch.no_grad()
def test_the_model_keeps_up_the_masks_that_it_reads(step, monkeypatch):
    seen, step_of = [], FixedKVCache.step
    monkeypatch.setattr(FixedKVCache, "step", lambda *given, **named: seen.append(named) or step_of(*given, **named))
    optimizations = Optimizations.all().replace(ifa_tiling=step == "ifa_tiling")
    config = small_config(num_hidden_layers=1)
    model = Qwen2ForCausalLM.from_state_dict(config, stock_weights(small_stock(config)), optimizations=optimizations)
    model(torch.ones(1, 3, dtype=torch.int64))
    assert [named["masks"] for named in seen] == [step != "ifa_tiling"]


@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
@torch.no_grad()
def test_a_mask_says_the_same_in_every_dtype(optimizations):
    """In a prompt and its loss, in steps beyond the positions that the model has, and in generate()."""
    stock = small_stock(small_config(num_hidden_layers=1, max_position_embeddings=8))
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
    ids, mask = torch.arange(1, 15).view(2, 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1]])

    def answers(mask: torch.Tensor) -> list[torch.Tensor]:
        places = (mask.long().cumsum(1) - 1).clamp(min=0)
        first = model(ids, attention_mask=mask, position_ids=places, labels=ids, use_cache=True)
        found = [first.logits, first.loss]
        for step in range(1, 4):
            mask, places = torch.cat((mask, mask.new_ones(2, 1)), dim=1), places[:, -1:] + 1
            call = {"attention_mask": mask, "position_ids": places, CACHE_NAME: cache_of(first)}
            found.append(model(ids[:, step : step + 1], **call).logits)
        return [*found, model.generate(ids, attention_mask=mask[:, :7], max_new_tokens=4, do_sample=False)]

    expected = answers(mask)
    for dtype in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        assert all(map(torch.equal, answers(mask.to(dtype)), expected)), dtype
