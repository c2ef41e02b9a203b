import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2_npu.compat import rope_frequencies
from qwen2_npu.conformance.accuracy import stock, teacher_forcing
from qwen2_npu.conformance.accuracy.batches import random_batch
from qwen2_npu.conformance.accuracy.configs import SHAPES, random_state_dict, small_config
from qwen2_npu.conformance.accuracy.noise import rms
from qwen2_npu.conformance.accuracy.stock import (
    HEAD_DIM_IS_FREE,
    exact,
    exact_reference,
    reference_dtype,
    stock_from_state_dict,
)
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.errors import CheckpointError


class NarrowFloats(TorchDispatchMode):
    """Operators whose result is in a float narrower than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        narrow = isinstance(out, torch.Tensor) and out.is_floating_point() and out.dtype != torch.float64
        # int64 positions become float32 first, exactly.
        if narrow and not any(isinstance(arg, torch.Tensor) and not arg.is_floating_point() for arg in args):
            self.seen.add(str(func))
        return out


@pytest.mark.parametrize("name", SHAPES)
def test_small_configs_keep_what_selects_an_operator(name: str) -> None:
    shape, config = SHAPES[name], small_config(name)
    assert config.num_attention_heads / config.num_key_value_heads == shape.heads / shape.kv_heads
    assert config.tie_word_embeddings is shape.tied
    assert config.rms_norm_eps == shape.eps
    assert rope_frequencies(config)[0][1].item() == pytest.approx(1e6 ** (-2 / shape.head_dim))
    published = {f"qwen2-{size.name.lower()}": size for size in SIZES.values()}
    for field in ("heads", "kv_heads", "head_dim", "tied") if name in published else ():
        assert getattr(shape, field) == getattr(published[name], field)
    state = random_state_dict(config)
    assert all(tensor.std() > 0.01 for tensor in state.values() if tensor.numel() > 1)  # no bias is 0, no norm is 1
    assert len({str(tensor.flatten()[:4]) for tensor in state.values()}) == len(state)
    model = stock_from_state_dict(config, state)
    attention = model.model.layers[0].self_attn
    assert attention.head_dim == shape.head_dim
    assert attention.k_proj.out_features == config.num_key_value_heads * shape.head_dim
    if HEAD_DIM_IS_FREE:
        assert (config.num_attention_heads, config.num_key_value_heads) == (shape.heads, shape.kv_heads)


def test_unknown_shape_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"qwen3.*qwen2-72b"):
        small_config("qwen3")


def test_random_weights_have_decided_tokens() -> None:
    """Margins of a few logits at most positions: a near-tie is the exception in any dtype."""
    config = small_config("qwen2-0.5b")
    batch = random_batch("four", config.vocab_size)
    with torch.no_grad():
        logits = stock_from_state_dict(config, random_state_dict(config))(batch.input_ids).logits
    best = logits.topk(2).values
    assert 3 < logits.std() < 6
    assert (best[..., 0] - best[..., 1]).median() > 0.3


def test_reference_computes_in_float64_throughout() -> None:
    config = small_config("qwen2-0.5b")
    reference = exact_reference(stock_from_state_dict(config, random_state_dict(config)))
    batch = random_batch("ragged", config.vocab_size)
    with torch.no_grad(), exact(reference), NarrowFloats() as narrow:
        logits = reference(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=teacher_forcing.position_ids_of(batch.attention_mask),
        ).logits
    assert logits.dtype == torch.float64
    assert not narrow.seen


@pytest.mark.parametrize("place", range(5))
def test_one_value_that_is_not_finite_is_found_wherever_it_is(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "PIECE", 2)
    for value, counted in ((float("nan"), "1 NaN and 0"), (float("-inf"), "0 NaN and 1"), (1e5, "0 NaN and 1")):
        tensor = torch.zeros(5)
        tensor[place] = value
        with pytest.raises(
            CheckpointError, match=f"^here: tensor b has {counted} infinite of 5 values in torch.float16"
        ):
            stock.check_finite({"a": torch.zeros(5), "b": tensor}, "here", torch.float16)


def test_exact_leaves_other_dtypes_alone() -> None:
    config = small_config("qwen2-0.5b")
    with exact(exact_reference(stock_from_state_dict(config, random_state_dict(config)))):
        assert torch.ones(2, dtype=torch.bfloat16).float().dtype == torch.float32
    assert torch.ones(2, dtype=torch.float64).float().dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_of_the_size_of_the_dtype(dtype: torch.dtype) -> None:
    config = small_config("qwen2-0.5b")
    state = random_state_dict(config, dtype=dtype)
    model = stock_from_state_dict(config, state, dtype=dtype)
    batch = random_batch("one", config.vocab_size)
    trace = teacher_forcing.run(model, batch, decode_steps=2)
    reference = teacher_forcing.run_reference(exact_reference(model), batch, trace.forced)
    error = abs(trace.prefill_logits - reference.prefill_logits).max() / abs(reference.prefill_logits).max()
    assert 0.1 * torch.finfo(dtype).eps < error < 30 * torch.finfo(dtype).eps


def test_stock_decode_agrees_with_one_pass_over_all_tokens() -> None:
    """The teacher's masks and positions under left padding: against a reference that knows no cache."""
    config = small_config("qwen2-0.5b")
    state = {name: tensor.double() for name, tensor in random_state_dict(config).items()}
    model = exact_reference(stock_from_state_dict(config, state))
    batch = random_batch("ragged", config.vocab_size)
    with exact(model):
        trace = teacher_forcing.run(model, batch, decode_steps=3)
    reference = teacher_forcing.run_reference(model, batch, trace.forced)
    assert abs(trace.decode_logits - reference.decode_logits).max() < 1e-12
    for row, alone in enumerate(batch.rows()):
        single = teacher_forcing.run_reference(model, alone, trace.forced[row : row + 1])
        assert abs(single.decode_logits[0] - reference.decode_logits[row]).max() < 1e-12


def test_misfitting_state_dict_is_named() -> None:
    config = small_config("qwen2-0.5b")
    state = random_state_dict(config)
    state["extra"] = state.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\], unexpected \['extra'\]"):
        stock_from_state_dict(config, state)


def test_reference_dtype_is_what_memory_allows() -> None:
    billion = 10**9
    assert reference_dtype(billion, torch.float32, 8 * billion) == torch.float64
    assert reference_dtype(billion, torch.bfloat16, 8 * billion) == torch.float64
    assert reference_dtype(billion, torch.bfloat16, 8 * billion - 1) == torch.float32
    with pytest.raises(MemoryError, match="--dtype bfloat16"):
        reference_dtype(billion, torch.float32, 8 * billion - 1)
    with pytest.raises(MemoryError, match=r"1 billion parameters needs 3.73 GiB"):
        reference_dtype(billion, torch.float16, billion)


def test_float32_reference_measures_the_same_noise_of_a_16_bit_baseline() -> None:
    config = small_config("qwen2-0.5b")
    model = stock_from_state_dict(config, random_state_dict(config, dtype=torch.bfloat16), dtype=torch.bfloat16)
    batch = random_batch("ragged", config.vocab_size)
    trace = teacher_forcing.run(model, batch, decode_steps=2)
    noises = [
        rms(
            trace.decode_logits
            - teacher_forcing.run_reference(exact_reference(model, dtype), batch, trace.forced).decode_logits
        )
        for dtype in (torch.float32, torch.float64)
    ]
    assert noises[0] == pytest.approx(noises[1], rel=1e-3)
