"""What pytest refuses before it collects a test; the rest of the plugin is seen at work in tests/perf."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.perf import documented, plugin
from qwen2_npu.conformance.perf.rows import MODES, Configuration
from qwen2_npu.conformance.perf.runner import Request
from qwen2_npu.conformance.perf.session import EVERY_ROW, GateOptions, LatencyGate
from qwen2_npu.optimizations import LADDER
from tests.perf.fake_runner import FakeRunner


def start(path: Path) -> None:
    """The start of a session with ``--model-path``."""
    option = SimpleNamespace(model_path=path, random_weights=None, gate_rows=EVERY_ROW, device="cpu")
    hook = SimpleNamespace(pytest_qwen2_npu_runner=plugin.pytest_qwen2_npu_runner)
    config: Any = SimpleNamespace(option=option, stash=pytest.Stash(), hook=hook)
    session: Any = SimpleNamespace(config=config)
    plugin.pytest_sessionstart(session)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not valid JSON"),
        (json.dumps({"model_type": "llama"}), "model_type='llama'"),
    ],
    ids=["empty_folder", "damaged", "another_model"],
)
def test_a_folder_that_is_no_checkpoint_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(pytest.UsageError, match=message):
        start(tmp_path)
    with pytest.raises(pytest.UsageError, match="is not a folder"):
        start(tmp_path / "absent")


def test_a_configuration_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}), encoding="utf-8")
    with pytest.raises(pytest.UsageError, match=r"has neither model\.safetensors nor"):
        start(tmp_path)


def test_a_checkpoint_is_accepted() -> None:
    start(tiny.path())


@pytest.mark.parametrize("path", [None, tiny.path()], ids=["random", "checkpoint"])
@pytest.mark.parametrize("steps", [None, ("swiglu", "fixed_kv_cache")], ids=["last", "some"])
def test_the_runner_is_asked_for_what_the_user_asked_for(path: Path | None, steps: tuple[str, ...] | None) -> None:
    """``decode_steps`` has the accuracy suite's default: only what was given counts."""
    size = None if path else "0.5B"
    given = {"device": "cpu", "model_path": path, "random_weights": size, "assume_tp": 2, "steps": steps}
    option = SimpleNamespace(**given, decode_steps=6, decode_steps_given=None)
    hook = SimpleNamespace(pytest_qwen2_npu_runner=plugin.pytest_qwen2_npu_runner)
    config: Any = SimpleNamespace(option=option, stash=pytest.Stash(), hook=hook)
    runner: Any = plugin.runner_of(config)
    assert runner.request == Request("cpu", size, path, 2, None)
    option.decode_steps_given = 9
    assert plugin.pytest_qwen2_npu_runner(config).request.decode_steps == 9  # type: ignore[attr-defined]
    runner.request = Request("cpu", size, path)  # the folder is no merged one
    name = size or tiny.path().name
    assert [row.configuration for row in plugin._user_rows(config) if row.phase == "decode"] == [
        Configuration(name, 1, batch, mode, step) for step in steps or LADDER[-1:] for mode in MODES for batch in (1, 4)
    ]


# ---- comparison by pytest-benchmark ----------------------------------------------------------------------------------
def test_machines_are_compared_by_fingerprint_where_both_have_one() -> None:
    plain = {"node": "a", "system": "Linux", "machine": "aarch64", "cpu": {"brand_raw": "b", "count": 2}}
    ours = plain | {"qwen2_npu": {"identity": {"device": "cpu"}}}
    for theirs, differing in (
        (plain, []),
        (plain | {"node": "z"}, ["node: z → a"]),
        (plain | {"cpu": {"brand_raw": "b", "count": 4}}, ["count: 4 → 2"]),
        (ours | {"node": "z"}, []),
        (ours | {"qwen2_npu": {"identity": {"device": "npu"}}}, ["device: npu → cpu"]),
    ):
        assert plugin._machine_differences(theirs, ours) == differing


@pytest.mark.parametrize(
    ("steps", "version", "left_out"), [(None, "4.37.0", 0), (9, "4.37.0", 38), (None, "5.24.0", 8)]
)
def test_only_what_may_be_held_against_the_tables_is_compared(steps: int | None, version: str, left_out: int) -> None:
    """Shorter runs not in decode, the stock model of another version not at all."""
    runner = FakeRunner({"identity": {"transformers": version}})
    stash = pytest.Stash()
    stash[plugin.RUNNER], stash[plugin.GATE] = runner, LatencyGate(GateOptions(False, EVERY_ROW, None, False), runner)
    config: Any = SimpleNamespace(option=SimpleNamespace(decode_steps_given=steps, decode_steps=6), stash=stash)
    said: list[str] = []
    session = SimpleNamespace(logger=SimpleNamespace(info=said.append))
    compared = {"benchmarks": [{"fullname": number.row.node_id} for number in documented.read()]}
    plugin._leave_out_what_may_not_be_held(config, session, compared)
    assert (len(said), len(compared["benchmarks"])) == (left_out, len(documented.read()) - left_out)
