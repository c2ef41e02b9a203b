"""The engine of `qwen2-npu verify`, where the command's own tests do not reach."""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM as StockQwen2

import qwen2_npu.conformance.accuracy.verify as module
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.batches import BATCH_SHAPES
from qwen2_npu.conformance.accuracy.pair import DECODE_STEPS, PERPLEXITY_TOKENS, PERPLEXITY_WINDOW
from qwen2_npu.conformance.accuracy.verify import verify
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.models.layers import MLP
from qwen2_npu.models.quantized import QuantizedLinear
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM
from qwen2_npu.optimizations import LADDER, Optimizations
from tests.accuracy import quantised
from tests.unit.small import small_stock


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "layer by layer"])
def test_a_failure_of_a_compiled_model_is_explained(stream: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the uncompiled one: steps taken off one by one, down to a model that cannot be compiled for an NPU."""
    right = MLP.forward

    def wrong(self: MLP, *given: Any) -> torch.Tensor:
        return right(self, *given) * 1.1

    monkeypatch.setattr(MLP, "forward", wrong)
    mode = "torchair" if device.startswith("npu") else "inductor"
    torch._dynamo.reset()
    result = verify(device=device, steps=["swiglu"], mode=mode, stream=stream)
    assert not result.passed
    assert "with every optimisation off, layer" in result.rows[0].explanation


# ---- what is asked of what -------------------------------------------------------------------------------------------
class Asked:
    """A pair that answers at once, and takes down which model each question is about."""

    name, dtype, reference_dtype, scheme = "x", torch.bfloat16, torch.float64, ""

    def __init__(self, fails: str, perplexity: bool) -> None:
        self.fails, self.passed, self.said = fails, perplexity, list[Any]()

    def _traces(self, shape: str) -> Any:
        number = list(BATCH_SHAPES).index(shape) + 1
        return SimpleNamespace(timed_tokens=number, decode_seconds=float(number**2))

    def lead(self, orders: Any) -> None:
        self.said.append(orders)

    def build(self, optimizations: Optimizations) -> Any:
        return optimizations

    def ask(self, function: Any, model: Any, **how: Any) -> Any:
        return function.__name__, model, how

    def traces(self, shape: str) -> Any:
        return self._traces(shape), None

    def compare(self, model: Any, shape: str) -> Any:
        self.said.append((model, shape))
        return SimpleNamespace(passed=shape != self.fails or len(self.said) < 5), self._traces(shape)

    def explain(self, optimizations: Optimizations, shape: str, *, build: Any) -> str:
        return f"{shape} of {build(optimizations) == optimizations}"

    def samples(self, model: Any, prompts: Any) -> list[Any]:
        self.said.append((model, len(prompts)))
        return []

    def perplexity(self, model: Any) -> Any:
        self.said.append((model, "perplexity"))
        return SimpleNamespace(passed=self.passed, error=SimpleNamespace(optimised=2.0, noise=1.0))


@pytest.mark.parametrize("mode", ["eager", "torchair"])
@pytest.mark.parametrize(("fails", "perplexity"), [("", True), ("ragged", True), ("", False)])
def test_every_question_is_about_the_model_of_its_step_in_the_mode(
    mode: str, fails: str, perplexity: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two steps fails, or the perplexity alone: the other ranks hear of both."""
    pair, given, checked = Asked(fails, perplexity), list[Any](), list[Any]()
    orders: Any = SimpleNamespace(tell=lambda what, **how: given.append((what, how)))
    monkeypatch.setattr(module.Orders, "of_ranks", lambda: orders)
    monkeypatch.setattr(module, "pair_of_checkpoint", lambda path, **how: given.append((path, how)) or pair)
    monkeypatch.setattr(module, "check_mode", lambda mode, place, step: checked.append((mode, place.type, step)))
    monkeypatch.setattr(module, "comparable", lambda *of: of)
    monkeypatch.setattr(module, "measure", lambda *of: of[:2])
    steps = [Optimizations.up_to(step) for step in ("fixed_kv_cache", "swiglu")]
    result = verify(
        None, device="cpu", dtype="float16", steps=["fixed_kv_cache", "swiglu"], mode=mode, stream=True, assume_tp=None,
        against=Path("/plain"),
    )  # fmt: skip
    first, second = ((step if mode == "eager" else ("compile_model", step, {"mode": mode})) for step in steps)
    asked = [(model, shape) for model in (first, second) for shape in BATCH_SHAPES]
    assert pair.said == [orders, *asked, (second, module.SAMPLE_PROMPTS), (second, "perplexity")]
    assert checked == [(mode, "cpu", step) for step in steps]
    how = {"dtype": "float16", "device": "cpu", "stream": True, "assume_tp": None}
    assert given == [(None, how), ("end", {"passed": not fails and perplexity})]
    assert result.passed is (not fails and perplexity)
    assert [row.passed for row in result.rows] == [True, not fails]
    assert result.rows[1].explanation == ("swiglu: batch ragged: ragged of True" if fails else "")
    assert result.cost == ((None, Path("/plain"), torch.float16), "cpu")  # type: ignore[comparison-overlap]
    for row in result.rows:
        assert row.tokens_per_second == row.baseline_tokens_per_second == 6 / 14


def test_the_other_ranks_read_the_checkpoint_as_the_first_does(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(module.Orders, "of_ranks", lambda: "orders")
    monkeypatch.setattr(
        module, "weights_of_checkpoint", lambda *of, **how: given.append((of, how)) or SimpleNamespace(build="build")
    )
    monkeypatch.setattr(module, "follow", lambda *of: of)
    assert module.take_part(Path("/x"), device="npu:1", dtype="float16", assume_tp=2) == ("orders", "build")
    how = {"dtype": "float16", "device": "npu:1", "decode_steps": DECODE_STEPS, "assume_tp": 2}
    assert given == [((Path("/x"),), how)]


# ---- steps that only several ranks have -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ranks", "device", "dtype", "steps", "left_out"),
    [
        (1, "cpu", "auto", LADDER, ""),
        (2, "cpu", "float32", (*LADDER, "mm_all_reduce"), ""),
        (4, "npu:0", "bfloat16", (*LADDER, "mm_all_reduce"), ""),
        (8, "npu:0", "auto", (*LADDER, "mm_all_reduce"), ""),
        (2, "npu:1", "float32", LADDER, "mm_all_reduce takes no float32 on an NPU"),
        (3, "cpu", "auto", LADDER, "mm_all_reduce takes 2, 4, 8 ranks, and there are 3"),
    ],
)
def test_the_steps_by_default(
    ranks: int, device: str, dtype: str, steps: tuple[str, ...], left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rank_count", lambda: ranks)
    assert module._steps(None, None, device, dtype) == (steps, left_out)
    assert module._steps(["swiglu"], None, device, dtype) == (["swiglu"], "")


@pytest.mark.parametrize(
    ("ranks", "device", "message"),
    [
        (1, "cpu", "takes 2, 4, 8 ranks, and there is 1; leave it out, or start as many"),
        (3, "cpu", "takes 2, 4, 8 ranks, and there are 3; leave it out, or start as many"),
        (2, "npu:0", "takes no float32 on an NPU; leave it out, or take --dtype bfloat16"),
    ],
)
def test_a_step_that_cannot_be_had_is_refused_before_any_work(
    ranks: int, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rank_count", lambda: ranks)
    monkeypatch.setattr(module, "pair_of_checkpoint", lambda *_, **__: pytest.fail("the stock model was made first"))
    with pytest.raises(UnsupportedError, match=f"^--steps swiglu,mm_all_reduce: mm_all_reduce {message}"):
        verify(device=device, dtype="float32", steps=["swiglu", "mm_all_reduce"])


def test_layer_by_layer_has_the_verdict_of_the_whole(tmp_path: Path) -> None:
    small_stock().save_pretrained(tmp_path, safe_serialization=True)
    said: list[tuple[str, int, int]] = []
    results = [
        verify(tmp_path, steps=["swiglu"], stream=stream, progress=lambda *what: said.append(what))
        for stream in (False, True)
    ]
    whole, layered = (result.to_dict() for result in results)
    assert whole["passed"]
    assert layered["passed"]
    assert (whole["streamed"], layered["streamed"]) == ("", "asked for")
    assert whole["reference_dtype"] == layered["reference_dtype"] == "float64"
    row, same = layered["rows"][0], whole["rows"][0]
    assert row["positions"] == same["positions"]
    for shape, batch in row["batches"].items():
        assert batch["paths"]["prefill"] == same["batches"][shape]["paths"]["prefill"]
    assert row["baseline_tokens_per_second"] is None
    assert same["baseline_tokens_per_second"] > 0
    assert ("stock model layer by layer: asked for", 0, 3) in said
    layers = [label for label, done, _ in said if ", layer " in label and done == 0]
    assert len(layers) == 3
    assert layers[0] == "stock model and float64 reference, layer 1 of 3"
    assert layers[1].endswith(" s per layer")


# ---- what it costs ---------------------------------------------------------------------------------------------------
def count_passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Forward passes and tokens through each model from now on; and how often the optimised one is made."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def counted(owner: type, name_of: Any) -> None:
        right = owner.forward  # type: ignore[attr-defined]

        def forward(self: Any, *given: Any, **named: Any) -> Any:
            count = counts[name_of(self)]
            count[0] += 1
            count[1] += named["input_ids"].numel()
            return right(self, *given, **named)

        monkeypatch.setattr(owner, "forward", forward)

    counted(Qwen2ForCausalLM, lambda model: "optimised")
    counted(StockQwen2, lambda model: "float64" if model.dtype == torch.float64 else "stock")
    right = Qwen2ForCausalLM.from_pretrained

    def made(*given: Any, **named: Any) -> Any:
        counts["made"][0] += 1
        return right(*given, **named)

    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", made)
    return counts


PROMPTS = 9 * 17
"""Tokens of the prompts of all batches, padding included."""
FORCED = 9 * DECODE_STEPS
WINDOWS = PERPLEXITY_TOKENS // PERPLEXITY_WINDOW
BATCHES = len(BATCH_SHAPES)


def test_passes_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model goes through each token once for each question: nothing is computed twice."""
    monkeypatch.setattr(module.Pair, "samples", lambda *_: [])
    counts = count_passes(monkeypatch)
    result = verify(device="cpu", steps=["fixed_kv_cache", "last_token_logits"])
    assert result.passed
    assert counts["made"][0] == 2
    assert counts["float64"] == [BATCHES + WINDOWS, PROMPTS + FORCED + PERPLEXITY_TOKENS]
    assert counts["stock"] == [BATCHES * (1 + DECODE_STEPS) + WINDOWS, PROMPTS + FORCED + PERPLEXITY_TOKENS]
    # With a cache and without one, and of the second step with logits_to_keep=1.
    assert counts["optimised"] == [
        BATCHES * (2 + 3 + 2 * DECODE_STEPS) + WINDOWS,
        PROMPTS * (2 + 3) + 2 * FORCED + PERPLEXITY_TOKENS,
    ]


def test_passes_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model writes them once. Where they part the stock model's own logits are at hand, and float64 is asked for
    the rows that part, up to there."""
    pair = module.pair_of_checkpoint(dtype="float32", device="cpu")
    model = pair.build(Optimizations.all())
    prompts = tiny.prompts()[:3]
    width = max(len(pair.encode(prompt)) for prompt in prompts)
    counts = count_passes(monkeypatch)
    pair.samples(model, prompts, max_new_tokens=6)
    assert counts == {"optimised": [6, 3 * (width + 5)], "stock": [6, 3 * (width + 5)]}
    right = module.Pair.greedy

    def other(self: Any, model: Any, *given: Any) -> list[list[int]]:
        rows = right(self, model, *given)
        if isinstance(model, Qwen2ForCausalLM):
            rows[1][3] += 1
        return rows

    monkeypatch.setattr(module.Pair, "greedy", other)
    counts.clear()
    samples = pair.samples(model, prompts, max_new_tokens=6)
    assert counts == {
        "optimised": [6, 3 * (width + 5)],
        "stock": [6, 3 * (width + 5)],
        "float64": [1, width + 3],
    }
    assert [bool(sample.divergence) for sample in samples] == [False, True, False]
    assert samples[1].divergence.startswith("row 1 diverges after 3 tokens: ")


# ---- 8-bit weights ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scheme", "dtype", "ranks", "steps", "left_out"),
    [
        ("w8a16", "auto", 1, (*LADDER, "w8a16"), ""),
        ("w8a8", "auto", 1, (*LADDER, "w8a8"), ""),
        ("w8a16", "float32", 1, (*LADDER, "w8a16"), ""),
        ("w8a8", "float32", 1, (*LADDER, "w8a16"), "w8a8 is not compared in float32, "),
        ("w8a8", "float16", 2, (*LADDER, "mm_all_reduce", "w8a8"), ""),
        ("w8a16", "auto", 3, (*LADDER, "w8a16"), "mm_all_reduce takes 2, 4, 8 ranks, and there are 3"),
    ],
)
def test_the_steps_of_8_bit_weights_by_default(
    scheme: str, dtype: str, ranks: int, steps: tuple[str, ...], left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rank_count", lambda: ranks)
    found, why = module._steps(None, quantised.folder(scheme), "cpu", dtype)
    assert tuple(found) == steps
    assert why.startswith(left_out)
    assert bool(why) is bool(left_out)


@pytest.mark.parametrize(
    ("scheme", "asked", "dtype", "message"),
    [
        ("", ["w8a16"], "auto", "w8a16: the weights of this checkpoint are not quantised; write one with qwen2-npu"),
        ("w8a16", ["swiglu", "w8a8"], "auto", "w8a8: this checkpoint is quantised for w8a16"),
        ("w8a8", ["w8a8"], "float32", "w8a8 is not compared in float32, .*; take --dtype bfloat16 or float16"),
    ],
)
def test_a_scheme_that_cannot_be_had_is_refused_before_any_work(
    scheme: str, asked: list[str], dtype: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pair_of_checkpoint", lambda *_, **__: pytest.fail("the stock model was made first"))
    with pytest.raises(UnsupportedError, match=f"^--steps {','.join(asked)}: {message}"):
        verify(quantised.folder(scheme) if scheme else None, device="cpu", dtype=dtype, steps=asked)


@pytest.mark.slow
@pytest.mark.slow_in_ci
@pytest.mark.parametrize(("scheme", "stream"), [("w8a16", False), ("w8a8", True)])
def test_a_quantised_checkpoint_and_what_it_costs(scheme: str, stream: bool) -> None:
    said: list[tuple[str, int, int]] = []
    result = verify(
        quantised.folder(scheme), device="cpu", steps=["last_token_logits", scheme], stream=stream,
        against=tiny.path(), progress=lambda *what: said.append(what),
    )  # fmt: skip
    assert result.passed, result.failures
    found = result.to_dict()
    assert (found["scheme"], [row["step"] for row in found["rows"]]) == (scheme, ["last_token_logits", scheme])
    assert "left_out" not in found
    cost = found["cost"]
    assert (cost["scheme"], cost["against"], cost["left_out"]) == (scheme, str(tiny.path()), "")
    assert len(cost["modules"]) == 4 * 7
    assert 0 < cost["whole"]["kl"] < 1e-3
    assert cost["whole"]["agreement"] > 0.95
    # The weights of one module alone cost less than all together.
    assert max(each["kl"] for each in cost["modules"].values()) < cost["whole"]["kl"]
    assert said[-1] == ("done", 5, 5)
    assert any(label.startswith("what 8 bits cost, layer 2 of 4") and done == 4 for label, done, _ in said)


@pytest.mark.parametrize("mode", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_wrong_scale_fails_the_step_of_the_scheme_alone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hides in the rounding of the logits: no other rule sees it."""
    right, prepared = QuantizedLinear.prepare, count()

    def prepare(self: QuantizedLinear) -> None:
        if self.out_features == 2 * 448 and next(prepared) % 4 == 0:  # of the first of four layers
            self.weight_scale.data[7] = self.weight_scale.data[8]
        right(self)

    monkeypatch.setattr(QuantizedLinear, "prepare", prepare)
    torch._dynamo.reset()
    result = verify(quantised.folder("w8a16"), device="cpu", steps=["last_layer", "w8a16"], mode=mode)
    ladder, step = result.rows
    assert ladder.passed
    assert all(comparison.passed for comparison in step.comparisons.values())
    assert not step.passed
    assert step.explanation.startswith("w8a16: layer 0, gate_proj channel 7 (npu_weight_quant_batchmatmul): RMS error")
    assert result.failures == [step.explanation]
