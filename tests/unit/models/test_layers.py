"""Every weight goes through ops.linear; the rotary table is right after conversions of the model, and when it grows."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.compat import CACHE_NAME
from qwen2_npu.models import backbone, layers
from qwen2_npu.models.layers import Embedding, RMSNorm, RotaryTable, RowParallelLinear
from qwen2_npu.models.quantized import QuantizedRows
from qwen2_npu.parallel.sharding import Shard
from tests.unit.small import V4, small_config, small_stock, stock_weights

FLOAT32, CPU = torch.float32, torch.device("cpu")


@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
def test_every_weight_is_multiplied_by_the_project_s_linear(optimizations, monkeypatch):
    model = Qwen2ForCausalLM(small_config(), optimizations=optimizations).eval()
    multiplied = []
    product = layers.linear
    monkeypatch.setattr(layers, "linear", lambda x, w, b: multiplied.append(w.data_ptr()) or product(x, w, b))
    model(torch.ones(1, 3, dtype=torch.int64))
    weights = [module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Linear)]
    assert sorted(multiplied) == sorted(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_an_unfused_norm_is_the_stock_norm_bit_for_bit(dtype):
    """Squares and their mean are in float32, whatever the dtype: in float16 those of 300 are infinite."""
    x, residual = torch.randn(2, 2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x * torch.tensor([1e-3, 0.1, 1.0, 30.0, 300.0]).to(dtype)[:, None]
    stock, ours = Qwen2RMSNorm(64, eps=1e-2).to(dtype), RMSNorm(64, 1e-2, fused=False).to(dtype)
    for norm in (stock, ours):
        norm.weight.copy_(torch.linspace(-2, 2, 64))
    normed, total = ours(x)
    assert torch.equal(normed, stock(x))
    assert total is x
    normed, total = ours(x, residual)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, stock(residual + x))


@pytest.mark.parametrize("step", ["flash_attention", "add_rms_norm"])
def test_every_norm_is_one_operator_from_its_step_on_and_none_before(step):
    config = small_config(num_hidden_layers=2)
    model = Qwen2ForCausalLM(config, optimizations=Optimizations.up_to(step)).eval()
    with Operators() as called:
        model(torch.ones(1, 3, dtype=torch.int64))
    norms = called.names.count("npu_rms_norm"), called.names.count("npu_add_rms_norm")
    assert norms == ((1, 4) if step == "add_rms_norm" else (0, 0))


class Operators(TorchFunctionMode):
    """The names of the operators that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("through", [torch.bfloat16, torch.float16])
def test_a_table_that_was_rounded_is_not_widened(through):
    config = small_config()
    table, fresh = RotaryTable(config), RotaryTable(config)
    table.prepare(torch.float32, torch.device("cpu"))
    for dtype in (through, torch.float32):
        table.to(dtype)
        table.prepare(dtype, torch.device("cpu"))
    fresh.prepare(torch.float32, torch.device("cpu"))
    assert torch.equal(table.cos, fresh.cos)
    assert torch.equal(table.sin, fresh.sin)


def test_a_table_built_in_inference_mode_is_an_ordinary_tensor():
    table = RotaryTable(small_config())
    with torch.inference_mode():
        table.prepare(torch.float32, torch.device("cpu"))
    assert not table.cos.is_inference()


# ---- a table that grows ---------------------------------------------------------------------------------------------
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 4.0, "original_max_position_embeddings": 128, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


def config_of(rope: str, positions: int) -> Any:
    if V4:
        if rope != "default":
            pytest.skip("transformers 4.37.0's model has no rope scaling")
        return small_config(max_position_embeddings=positions)
    parameters = {"rope_type": rope, "rope_theta": 1e4, **ROPES[rope]}
    return small_config(max_position_embeddings=positions, rope_parameters=parameters)


@pytest.mark.skipif(V4, reason="4.37.0's model has no rope scaling, and a table of its own")
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_table_has_the_stock_numbers_bit_for_bit(rope, dtype):
    """cos and sin are scaled before they are rounded; yarn alone scales them."""
    config = config_of(rope, 512)
    table, places = RotaryTable(config), torch.arange(512)[None]
    table.prepare(dtype, CPU)
    stock = Qwen2RotaryEmbedding(config)
    assert (stock.attention_scaling != 1) == (rope == "yarn")
    for found, expected in zip(table(places, head_axis=2), stock(torch.empty(0, dtype=dtype), places), strict=True):
        assert torch.equal(found[:, :, 0], expected)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_that_grew_has_the_numbers_of_one_that_was_whole(rope, dtype, monkeypatch):
    config = config_of(rope, 3000)
    whole = RotaryTable(config)
    whole.prepare(dtype, CPU)
    assert whole.cos.shape == (3000, 64)
    monkeypatch.setattr(layers, "TABLE_ROWS", 64)
    table = RotaryTable(config)
    for needed, rows in ((0, 64), (64, 64), (65, 128), (100, 128), (1000, 1024), (3, 1024), (2999, 3000), (4000, 3000)):
        table.prepare(dtype, CPU, needed)
        assert table.cos.shape == table.sin.shape == (rows, 64)
        assert torch.equal(table.cos, whole.cos[:rows])
        assert torch.equal(table.sin, whole.sin[:rows])
    table.prepare(dtype, CPU, 4000, padded=3001)  # the last is of a token after padding
    assert table.cos.shape == (4096, 64)
    assert torch.equal(table.cos[:3000], whole.cos)


@pytest.mark.parametrize(("needed", "rows"), [(0, 64), (256, 256), (257, 300), (300, 300), (301, 300)])
def test_a_table_ends_with_the_positions_of_the_model(needed, rows, monkeypatch):
    """Its first size, too; only padding takes more."""
    monkeypatch.setattr(layers, "TABLE_ROWS", 64)
    table, padded = (RotaryTable(small_config(max_position_embeddings=300)) for _ in range(2))
    table.prepare(FLOAT32, CPU, needed)
    assert table.cos.shape[0] == table.sin.shape[0] == rows
    padded.prepare(FLOAT32, CPU, needed, padded=needed)
    assert padded.cos.shape[0] == (512 if needed > 300 else rows)


def test_a_table_is_kept_while_it_serves(monkeypatch):
    """Graphs hold its address."""
    monkeypatch.setattr(layers, "TABLE_ROWS", 64)
    table = RotaryTable(small_config())
    table.prepare(FLOAT32, CPU, 100)
    cos, sin = table.cos, table.sin
    for needed in (0, 100, 128):
        table.prepare(FLOAT32, CPU, needed)
        assert table.cos is cos
        assert table.sin is sin


def test_threads_that_need_tables_of_different_sizes(monkeypatch):
    monkeypatch.setattr(layers, "TABLE_ROWS", 8)
    for _ in range(20):
        table = RotaryTable(small_config())
        failures: list[str] = []

        def use(needed: int, table: RotaryTable = table, failures: list[str] = failures) -> None:
            table.prepare(FLOAT32, CPU, needed)
            if min(len(table.cos), len(table.sin)) < needed:
                failures.append(f"{needed} needed, {len(table.cos)} and {len(table.sin)} there")

        threads = [threading.Thread(target=use, args=(needed,)) for needed in (500, 9, 250, 30, 120)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


class Computed(TorchFunctionMode):
    """Counts the numbers whose sine or cosine is computed."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.sin, torch.cos, torch.Tensor.sin, torch.Tensor.cos):
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_a_million_positions_and_a_short_prompt():
    """No more is computed, and held, than for 131072 positions; and each number once, not for both halves."""
    model = Qwen2ForCausalLM(small_config(max_position_embeddings=1_010_000, num_hidden_layers=1)).to(torch.bfloat16)
    with Computed() as computed:
        model.eval().generate(torch.arange(1, 9)[None], max_new_tokens=2)
    held = [table.numel() * table.element_size() for table in (model.model.rotary.cos, model.model.rotary.sin)]
    assert sum(held) == 2 * 131072 * 64 * 2
    assert computed.count == 131072 * 64
    assert torch.equal(model.model.rotary.cos[:, :32], model.model.rotary.cos[:, 32:])


@pytest.mark.parametrize("positions", [10**7, 2**31 - 1])
def test_positions_that_nobody_asked_for_cost_nothing(positions):
    config = small_config(max_position_embeddings=positions, num_hidden_layers=1)
    weights = stock_weights(small_stock(small_config(num_hidden_layers=1)))
    model = Qwen2ForCausalLM.from_state_dict(config, weights)
    ids = torch.arange(1, 9)[None]
    model.generate(ids, max_new_tokens=2)
    assert model.model.rotary.cos.shape == (layers.TABLE_ROWS, 64)
    if positions == 10**7 and not V4:  # 4.37.0's own model computes all of them
        far = torch.arange(140_000, 140_008)[None]
        logits = model(ids, position_ids=far).logits
        with torch.no_grad():
            expected = small_stock(config)(ids, position_ids=far).logits
        assert (logits - expected).abs().max() < 1e-3
        assert model.model.rotary.cos.shape == (2**18, 64)


@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
@pytest.mark.parametrize("far", [False, True], ids=["counted", "given"])
def test_every_way_to_beyond_the_first_table(optimizations, far, monkeypatch):
    """A long prompt, a long generation, and positions that are given from the prompt on or in a decode step alone."""
    config = small_config(num_hidden_layers=1)
    weights = stock_weights(small_stock(config))
    whole, growing = (Qwen2ForCausalLM.from_state_dict(config, weights, optimizations=optimizations) for _ in "ab")
    ids = torch.arange(1, 41)[None]

    def run(model: Qwen2ForCausalLM) -> list[torch.Tensor]:
        results = [model(ids).logits, model.generate(ids[:, :5], max_new_tokens=60, do_sample=False)]
        cache = model.allocate_cache(1, 50)
        positions = torch.arange(5)[None] + (200 if far else 0)
        results.append(model(ids[:, :5], past_key_values=cache, position_ids=positions).logits)
        for position in (5, 77, 400) if far else (5, 6, 7):
            given = torch.tensor([[position]])
            step = model(ids[:, :1], past_key_values=cache, position_ids=given, output_hidden_states=True)
            results += [step.logits, torch.tensor(len(step.hidden_states))]
        return results

    expected = run(whole)
    for module in (layers, backbone):
        monkeypatch.setattr(module, "TABLE_ROWS", 16)
    assert all(torch.equal(one, other) for one, other in zip(run(growing), expected, strict=True))
    assert 16 < len(growing.model.rotary.cos) <= len(whole.model.rotary.cos)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 120, 199])
def test_every_token_is_looked_up_by_one_of_the_ranks(size, padding):
    config = small_config(vocab_size=200, pad_token_id=padding)
    whole, ids = torch.randn(config.vocab_size, config.hidden_size), torch.arange(config.vocab_size).view(1, -1)
    found, summed = torch.zeros(1, *whole.shape), []
    for rank in range(size):
        ranks = SimpleNamespace(shard=Shard(rank, size), all_reduce=lambda part: summed.append(part) or part)
        table = Embedding(config, ranks)
        table.weight.data = whole[table.first : table.first + table.num_embeddings]
        part = table(ids)
        assert (part != 0).any(-1).sum() == table.num_embeddings
        found += part
    assert torch.equal(found[0], whole)
    assert len(summed) == (size if size > 1 else 0)


def test_the_angles_of_all_heads_turn_the_first_ones_and_leave_the_others():
    cos, sin = torch.randn(2, 3, 2, 1, 4).unbind(0)
    for_each = layers.for_all_heads(cos, sin, 5, 2)
    for found, angle, still in zip(for_each, (cos, sin), (1, 0), strict=True):
        assert found.shape == (3, 2, 7, 4)
        assert torch.equal(found[:, :, :5], angle.expand(3, 2, 5, 4))
        assert (found[:, :, 5:] == still).all()


@pytest.mark.parametrize("rows", ["tensor", "quantised"])
def test_positions_are_taken_of_values_and_of_their_scales(rows):
    values, index = torch.arange(24).view(2, 4, 3), torch.tensor([[3, 0, 0], [1, 2, 1]])
    expected = torch.stack([values[row][index[row]] for row in range(2)])
    if rows == "tensor":
        assert torch.equal(layers.take_positions(values, index), expected)
        return
    found = layers.take_positions(QuantizedRows(values, values[..., 0].float()), index)
    assert torch.equal(found.values, expected)
    assert torch.equal(found.scale, expected[..., 0].float())


def test_product_and_sum_are_one_operator_in_prefill_alone(monkeypatch):
    """A decode step has too few rows to gain from it."""
    calls = []
    ranks = SimpleNamespace(all_reduce=lambda found: calls.append("all_reduce") or found)
    layer = RowParallelLinear(4, 3, ranks)
    layer.hcom = "group"
    one = SimpleNamespace(npu_mm_all_reduce_base=lambda x, weight, hcom: calls.append(hcom) or x @ weight)
    monkeypatch.setattr(torch.ops, "npu", one)
    x = torch.randn(2, 1, 4)
    for phase in ("prefill", "extend", "decode"):
        assert torch.allclose(layer(x, phase), x @ layer.weight.t())
    assert calls == ["group", "group", "all_reduce"]


@pytest.mark.parametrize("step", ["none", "flash_attention", "fused_gate_up", "swiglu", "last_layer", "all"])
@torch.no_grad()
def test_every_product_that_is_summed_is_told_the_phase(step, monkeypatch):
    """Where few rows are computed, which the fused operator is not for, it is that of a decode step."""
    optimizations = {"none": Optimizations.none(), "all": Optimizations.all()}.get(step) or Optimizations.up_to(step)
    model = Qwen2ForCausalLM(small_config(num_hidden_layers=2), optimizations)
    told, right = [], RowParallelLinear.forward

    def forward(self, given, phase="not told"):
        told.append(phase)
        return right(self, given, phase)

    monkeypatch.setattr(RowParallelLinear, "forward", forward)
    cache, few = model.allocate_cache(1, 9), "decode" if optimizations.last_layer else None
    for tokens, phase in ((5, "prefill"), (3, "extend"), (1, "decode")):
        if phase == "decode" and not optimizations.fixed_kv_cache:
            continue  # the growing cache's steps are of any number of tokens
        told.clear()
        model(torch.ones(1, tokens, dtype=torch.int64), logits_to_keep=1, **{CACHE_NAME: cache})
        assert told == [phase] * 2 + [few or phase] * 2
