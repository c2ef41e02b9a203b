"""What pytest refuses before it collects a test; the rest of the plugin is seen at work in tests/perf."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.perf import plugin
from qwen2_npu.conformance.perf.rows import MODES, Configuration
from qwen2_npu.conformance.perf.runner import Request
from qwen2_npu.conformance.perf.session import EVERY_ROW
from qwen2_npu.optimizations import LADDER


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
