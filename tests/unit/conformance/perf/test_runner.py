"""One generate call per configuration, and what cannot be measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance import children, jobs, tiny
from qwen2_npu.conformance.jobs import JobError
from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.machine.verified import Where
from qwen2_npu.conformance.perf import documented, protocol, runner
from qwen2_npu.conformance.perf.measurement import Measurement
from qwen2_npu.conformance.perf.rows import Configuration
from qwen2_npu.conformance.perf.runner import DeviceRunner, Request
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.errors import CheckpointError
from qwen2_npu.parallel import job
from tests.unit.checkpoint.merges import config_of, guide_merged, weights_of, write_folder

SEVEN = Configuration("7B", 1, 4, "eager", "swiglu")


def test_both_phases_share_one_generate_call_and_batches_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, built = [], []

    def measure(model: Any, **settings: Any) -> Any:
        measured.append(settings)
        return object()

    def build(self: Any, configuration: Configuration, device: str) -> Any:
        built.append((configuration.step, device))
        return object()

    monkeypatch.setattr(protocol, "measure", measure)
    monkeypatch.setattr("qwen2_npu.conformance.perf.builds.Weights.build", build)
    bench = DeviceRunner(Request("cpu", decode_steps=7))
    one = bench.measured(SEVEN)
    assert bench.measured(SEVEN) is one
    other = bench.measured(Configuration("7B", 1, 8, "eager", "swiglu"))
    assert other is not one
    assert built == [("swiglu", "cpu")]
    assert measured == [
        {"batch": 4, "weights": "random", "decode_steps": 7},
        {"batch": 8, "weights": "random", "decode_steps": 7},
    ]
    bench.measured(Configuration("7B", 1, 8, "eager", "original"))
    assert built[1:] == [("original", "cpu")]


@pytest.mark.parametrize("other", [{"model": "0.5B"}, {"mode": "graph"}, {"step": "original"}], ids=str)
def test_what_is_another_model_is_built_anew(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Configuration] = []
    monkeypatch.setattr(protocol, "measure", lambda model, **settings: model)
    monkeypatch.setattr(
        "qwen2_npu.conformance.perf.builds.Weights.build",
        lambda self, what, device: built.append(what) or (self.size.name, what),
    )
    bench = DeviceRunner(Request("cpu"))
    for what in (SEVEN, replace(SEVEN, **other)):
        assert bench.measured(what) == (what.model, what)
    assert built == [SEVEN, replace(SEVEN, **other)]


def test_what_cannot_be_measured() -> None:
    everything, half = on_cards(2), DeviceRunner(Request("cpu", random_weights="0.5B"))
    assert everything.why_not(SEVEN) is None
    assert half.why_not(SEVEN) == "needs the 7B model: 0.5B was asked for"
    eight = Configuration("72B", 8, 4, "graph", "fused_qkv")
    assert everything.why_not(eight) == "needs 8 cards of this kind: npu has 2"
    assert half.why_not(eight) == "needs the 72B model: 0.5B was asked for"
    assert (half.model_name, everything.model_name) == ("0.5B", None)
    assert everything.size(SEVEN) is SIZES["7B"]


@pytest.mark.parametrize("cards", [2, 8])
def test_every_documented_row_can_be_measured_where_there_are_cards_enough(cards: int) -> None:
    bench = on_cards(cards)
    for what in {number.row.configuration for number in documented.read()}:
        assert (bench.why_not(what) is None) == (what.cards <= cards)


# ---- jobs of several ranks ------------------------------------------------------------------------------------------
TWO = Configuration("7B", 2, 4, "eager", "swiglu")
ONE_STEP = Measurement(5.0, (2.0,), (), (0, 4), 4, 1)


def on_cards(cards: int) -> DeviceRunner:
    """A runner that sees as many NPUs."""
    found = DeviceRunner(Request("npu"))
    found.fingerprint = Fingerprint({"device": "npu", "cards": cards, "verified": "npu (CANN 9)"}, Where.NPU)
    return found


class Jobs:
    """In place of a launcher: what the ranks leave behind. Counts the jobs."""

    def __init__(
        self, status: int | None = 0, said: tuple[str, ...] = (), result: dict[str, Any] | None = None
    ) -> None:
        self.status, self.said, self.result, self.requests = status, said, result, list[dict[str, Any]]()

    def __call__(self, command: list[str], seconds: float, **place: Any) -> tuple[int | None, list[str]]:
        folder = Path(command[-1])
        self.requests.append(json.loads((folder / jobs.REQUEST).read_text()))
        if self.result is not None:
            (folder / jobs.RESULT).write_text(json.dumps(self.result))
        return self.status, list(self.said)


def test_a_row_on_several_cards_is_one_job_and_this_process_holds_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Jobs(result={"verified": "npu (CANN 9)", "measurement": asdict(ONE_STEP)})
    monkeypatch.setattr(children, "run_to_end", ranks)
    bench = on_cards(2)
    bench._model = (SEVEN, object())
    assert bench.measured(TWO) == bench.measured(TWO) == ONE_STEP
    assert bench._model is None
    (request,) = ranks.requests
    assert request == {
        "configuration": asdict(TWO),
        "device": "npu",
        "model_path": None,
        "assume_tp": None,
        "decode_steps": 1023,
    }


@pytest.mark.parametrize(
    ("ranks", "cause"),
    [
        (Jobs(1, ("error: rank 1 ended without a word: killed",)), "rank 1 ended without a word: killed"),
        (Jobs(0), "the ranks ended with status 0 and without a result: no output"),
        (Jobs(1, result={}), "the ranks ended with status 1 and without a result: no output"),
        (Jobs(None), "the ranks did not end within 7200 s"),
        (
            Jobs(result={"verified": "emulated (torch_npu)", "measurement": asdict(ONE_STEP)}),
            "the ranks computed on emulated (torch_npu), and this process on npu (CANN 9)",
        ),
        (
            Jobs(result={"verified": "npu (CANN 8)", "measurement": asdict(ONE_STEP)}),
            "the ranks computed on npu (CANN 8), and this process on npu (CANN 9)",
        ),
    ],
    ids=["failed", "no_result", "failed_at_the_end", "too_long", "on_another_device", "with_another_cann"],
)
def test_a_failed_job_is_one_cause_for_both_phases(ranks: Jobs, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "run_to_end", ranks)
    bench = on_cards(2)
    for _ in ("prefill", "decode"):
        with pytest.raises(JobError) as failed:
            bench.measured(TWO)
        assert str(failed.value) == f"7B on 2 cards, batch 4, eager, swiglu: {cause}"
    assert len(ranks.requests) == 1


def test_a_checkpoint_is_measured_for_real() -> None:
    bench = DeviceRunner(Request("cpu", model_path=tiny.path(), decode_steps=2))
    name = bench.model_name
    assert name == tiny.path().name
    configuration = Configuration(name, 1, 1, "eager", "swiglu")
    found = bench.measured(configuration)
    assert found.weights == name
    assert (len(found.decode_ms), found.contexts) == (2, (0, 1024, 1025))
    assert bench.size(configuration).name == name
    assert bench.fingerprint.identity["device"] == "cpu"


def test_a_folder_that_does_not_record_for_how_many_ranks_it_was_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(4, 2)
    config.max_position_embeddings = 2048
    folder = write_folder(tmp_path / "guide", config, guide_merged(config, weights_of(config), 2))
    monkeypatch.chdir(tmp_path)
    bench = DeviceRunner(Request("cpu", model_path=Path("guide"), assume_tp=2, decode_steps=1))
    for step in ("original", "swiglu"):
        assert bench.measured(Configuration(str(bench.model_name), 1, 1, "eager", step)).weights == "guide"
    with pytest.raises(CheckpointError, match="--assume-tp N"):
        DeviceRunner(Request("cpu", model_path=folder)).model_name  # noqa: B018
    ranks = Jobs(result={"verified": bench.fingerprint.identity["verified"], "measurement": asdict(ONE_STEP)})
    monkeypatch.setattr(children, "run_to_end", ranks)
    bench._measure_in_ranks(TWO)
    (request,) = ranks.requests
    assert request["model_path"] == str(folder)  # the ranks run in another folder
    assert (request["assume_tp"], request["decode_steps"]) == (2, 1)


@pytest.fixture(autouse=True)
def _with_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "is_installed", lambda: True)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection takes half a second in a process with everything loaded."""
    monkeypatch.setattr(runner.gc, "collect", lambda: 0)
