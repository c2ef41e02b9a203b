"""This model against the stock one, eager and compiled, in the same run: the gate is on the ratio, not on time.

    pytest tests/perf/test_relative.py                                       # small shapes, any machine
    pytest tests/perf/test_relative.py --device cuda --random-weights 0.5B   # a real shape

What is required of each pair is in baselines/relative.toml, with where it comes from.
"""

from __future__ import annotations

import importlib.util
import time
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from qwen2_npu import emulator
from qwen2_npu.conformance.perf.builds import random_stock
from qwen2_npu.conformance.perf.documented import BASELINES
from qwen2_npu.conformance.perf.ratio import failure, measure_ratio, take_turns
from qwen2_npu.conformance.sizes import SIZES, Size
from tests.perf.relative import HAS_STATIC_CACHE, Candidate, why_not

pytestmark = pytest.mark.perf

SMALL = Size("small", 896, 4864, 2, 14, 2, 64, 4096, tied=True)
SOURCE = BASELINES / "relative.toml"
REQUIREMENTS: dict[str, Any] = tomllib.loads(SOURCE.read_text(encoding="utf-8"))


def pairs(device: str) -> list[tuple[str, str, str]]:
    """Phase, candidate and against of all that is required on ``device``."""
    kind = device.split(":")[0]
    requirements = REQUIREMENTS[table_of(device)]["requirements"]
    return [(r["phase"], r["candidate"], r["against"]) for r in requirements if kind not in r.get("not_on", {})]


def device_of(config: pytest.Config) -> str:
    """The device asked for; the CPU in place of an emulated NPU, whose latency is nobody's."""
    device = str(config.option.device)
    return "cpu" if device.startswith("npu") and emulator.is_active() else device


def table_of(device: str) -> str:
    return "cpu" if device == "cpu" else "other"


def required(device: str, phase: str, candidate: str, against: str) -> float:
    table = REQUIREMENTS[table_of(device)]["requirements"]
    (ratio,) = (r["ratio"] for r in table if (r["phase"], r["candidate"], r["against"]) == (phase, candidate, against))
    return float(ratio)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "against" in metafunc.fixturenames:
        metafunc.parametrize(("phase", "candidate", "against"), pairs(device_of(metafunc.config)))


class Bench:
    """Candidates of one stock model, each built and warmed up once."""

    def __init__(self, device: str, size: Size, dtype: torch.dtype) -> None:
        self.device = device
        self.stock = random_stock(size.config(), dtype, torch.device(device), attention=None)
        self._candidates: dict[str, Candidate] = {}

    def candidate(self, name: str) -> Candidate:
        if name not in self._candidates:
            built = Candidate(name, self.stock, batch=4, prompt=64, steps=8)
            for _ in range(2):  # the second turn finds everything compiled
                built.decode()
            built.prefill()
            self._candidates[name] = built
        return self._candidates[name]


@pytest.fixture(scope="module")
def bench(pytestconfig: pytest.Config) -> Iterator[Bench]:
    device = device_of(pytestconfig)
    name = pytestconfig.option.random_weights
    threads = torch.get_num_threads()
    if name is None:
        torch.set_num_threads(1)  # a second thread waits for whoever else has the core
    torch._dynamo.reset()
    yield Bench(device, SIZES[name] if name else SMALL, torch.float32 if device == "cpu" else torch.bfloat16)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_ratio_to_the_stock_model(phase: str, candidate: str, against: str, bench: Bench, record_property: Any) -> None:
    missing = why_not(against)
    if missing is not None:
        pytest.skip(missing)
    ours, stock = bench.candidate(candidate), bench.candidate(against)
    least = required(bench.device, phase, candidate, against)
    ratio = measure_ratio(getattr(stock, phase), getattr(ours, phase), least)
    record_property("ratio", str(ratio))
    print(f"{phase}: {candidate} against {against} on {bench.device}: {ratio}, at least {least:.2f} required")
    reason = failure(ratio, least, f"{phase}: {candidate} against {against} on {bench.device}")
    if reason is not None:
        pytest.fail(reason, pytrace=False)


@pytest.mark.slow
def test_a_slow_operator_fails_the_ratio(bench: Bench) -> None:
    """Every residual add and norm computed 201 times: the gate that passes above must see it."""
    ours, stock = bench.candidate("ours eager"), bench.candidate("stock eager")
    model = ours.model
    right = torch.ops.npu.npu_add_rms_norm

    def repeated(*arguments: Any) -> Any:
        for _ in range(200):
            right(*arguments)
        return right(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.npu, "npu_add_rms_norm", repeated)
        assert model.optimizations.add_rms_norm
        least = required(bench.device, "decode", "ours eager", "stock eager")
        ratio = measure_ratio(stock.decode, ours.decode, least)
    assert "is slower than required" in str(failure(ratio, least, "decode"))


def test_a_cache_attended_at_its_full_length_fails_the_ratio() -> None:
    """64 live tokens in a cache of 8192: reading all of it every step is many times the work."""
    heads, kv_heads, size, live, capacity = 14, 2, 64, 64, 8192
    query = torch.randn(1, 1, heads, size)
    key, value = (torch.randn(1, capacity, kv_heads, size) for _ in range(2))

    def attend(lengths: list[int]) -> float:
        start = time.perf_counter()
        torch.ops.npu.npu_incre_flash_attention(
            query, key, value, num_heads=heads, num_key_value_heads=kv_heads, scale_value=0.125,
            input_layout="BSND", actual_seq_lengths=lengths,
        )  # fmt: skip
        return time.perf_counter() - start

    turns = {"right": lambda: attend([live]), "fault": lambda: attend([capacity])}
    take_turns(turns, 3)
    ratio = measure_ratio(turns["right"], turns["fault"], 0.9)
    assert "is slower than required" in str(failure(ratio, 0.9, "attention"))
    same = measure_ratio(turns["right"], turns["right"], 0.5)
    assert failure(same, 0.5, "attention") is None


def test_a_pair_that_cannot_run_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected all the same: --gate fails what is skipped, and cannot see what is not there."""
    monkeypatch.setitem(globals(), "why_not", lambda name: f"no {name} here")
    unused: Any = None
    with pytest.raises(pytest.skip.Exception, match="no stock compiled here"):
        test_ratio_to_the_stock_model("decode", "ours compiled", "stock compiled", unused, unused)


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="torchair comes with torch_npu")
def test_the_pair_left_out_on_an_npu_cannot_run_there() -> None:
    """The day it can, this fails: take not_on out of relative.toml."""
    (reason,) = (r["not_on"]["npu"] for r in REQUIREMENTS["other"]["requirements"] if "not_on" in r)
    assert reason.startswith("torchair has no converter for index_copy")
    if not HAS_STATIC_CACHE:
        assert not hasattr(transformers, "StaticCache")
        return
    import torchair

    size = Size("tiny", 64, 128, 2, 4, 2, 16, 256, tied=True)
    stock = random_stock(size.config(), torch.bfloat16, torch.device("npu"), attention=None)
    torch._dynamo.reset()
    compiled = torch.compile(stock.forward, fullgraph=True, backend=torchair.get_npu_backend())
    cache = transformers.StaticCache(config=stock.config, max_cache_len=16)
    tokens = torch.ones(2, 1, dtype=torch.long, device="npu")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"index_copy\.default ge_converter is not impl"):
        compiled(input_ids=tokens, use_cache=True, past_key_values=cache)


def test_requirements_are_complete_and_say_where_they_come_from() -> None:
    assert len(pairs("cpu")) == 5
    assert pairs("cpu") == pairs("cuda")
    assert set(pairs("cuda")) - set(pairs("npu:0")) == {("decode", "ours compiled", "stock compiled")}
    for table in REQUIREMENTS.values():
        for requirement in table["requirements"]:
            assert 0.5 < requirement["ratio"] < 3
            assert requirement["measured"]
