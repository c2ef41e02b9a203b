"""Options of the suites, in the root conftest.py: what is no sensible value is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_npu import Optimizations
from tests.accuracy import pairs
from tests.unit.checkpoint.merges import guide_merged, write_folder
from tests.unit.small import small_stock, stock_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def conftest(pytestconfig: pytest.Config) -> Any:
    """The conftest.py that this session runs with."""
    plugins = pytestconfig.pluginmanager.get_plugins()
    return next(plugin for plugin in plugins if getattr(plugin, "__file__", "") == str(ROOT / "conftest.py"))


@pytest.fixture
def decode_steps(conftest: Any) -> Callable[[str], int]:
    """What reads --decode-steps."""
    reader: Callable[[str], int] = conftest._decode_steps
    return reader


def test_the_header_says_what_computes(conftest: Any, pytestconfig: pytest.Config) -> None:
    """It is not shown with --quiet, so nothing else runs it there."""
    said = conftest.pytest_report_header(pytestconfig)
    assert said == f"qwen2-npu: device {pytestconfig.option.device}, verified with {said.split('with ')[1]}"
    assert said.split("with ")[1].split(" ")[0] in ("npu", "emulated", "cpu", "cuda")


@pytest.mark.parametrize(
    "value", ["0", "-1", "", "nan", "inf", "1.5", "1e3", "1_0", "²", "٣", "1000001", "9" * 20, "9" * 5000, "0" * 5000]
)
def test_decode_steps_that_cannot_be_taken(decode_steps: Callable[[str], int], value: str) -> None:
    with pytest.raises(
        pytest.UsageError, match=f"^--decode-steps {value}: must be a positive integer, at most 1000000$"
    ):
        decode_steps(value)


@pytest.mark.parametrize(("value", "number"), [("1", 1), ("007", 7), ("1000000", 1_000_000)])
def test_decode_steps_that_can(decode_steps: Callable[[str], int], value: str, number: int) -> None:
    assert decode_steps(value) == number


@pytest.mark.parametrize("value", ["nope", "swiglu,nope", "nope,swiglu", ",", ""])
def test_a_step_that_there_is_not_is_refused(conftest: Any, value: str) -> None:
    with pytest.raises(pytest.UsageError, match=f"^--steps {value}: the steps of the ladder are fixed_kv_cache, "):
        conftest._steps(value)


@pytest.mark.parametrize("size", [None, "0.5B"])
def test_assume_tp_is_for_a_folder(
    conftest: Any, pytestconfig: pytest.Config, size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytestconfig.option, "assume_tp", 2)
    monkeypatch.setattr(pytestconfig.option, "random_weights", size)
    monkeypatch.setattr(pytestconfig.option, "model_path", None)
    with pytest.raises(pytest.UsageError, match=r"^--assume-tp needs --model-path DIR$"):
        conftest.pytest_configure(pytestconfig)


def test_a_folder_that_does_not_record_its_layout_is_compared(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stock = small_stock()
    folder = write_folder(tmp_path / "guide", stock.config, guide_merged(stock.config, stock_weights(stock), 2))
    (folder / "tokenizer_config.json").unlink()  # random tokens do
    given = {"device": "cpu", "assume_tp": 2, "model_path": folder, "stream": None, "decode_steps": 2}
    for name, value in given.items():
        monkeypatch.setattr(pytestconfig.option, name, value)
    assert pairs.streamed(pytestconfig, "float32") == ""
    assert pairs.pair_of(pytestconfig, pairs.CHECKPOINT, "float32").failure(Optimizations.all(), "one") == ""


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (None, "--steps w8a16,w8a8: tests/perf times 8-bit weights with --random-weights SIZE"),
        ("57B-A14B", "--steps w8a16,w8a8: 57B-A14B is a mixture of experts, which is not computed in 8 bits; use"),
        ("7B", ""),
    ],
)
def test_8_bit_weights_are_timed_where_there_is_a_model_for_them(conftest: Any, size: str | None, message: str) -> None:
    option = SimpleNamespace(random_weights=size, model_path=None, steps=conftest._steps("swiglu,w8a16,w8a8"))
    said = pytest.raises(pytest.UsageError, match=f"^{message}") if message else nullcontext()
    with said:
        conftest._refuse_8_bits(option)
