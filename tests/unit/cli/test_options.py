"""Options that several commands share."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from qwen2_npu import emulator
from qwen2_npu.cli import COMMANDS, main, options


@pytest.mark.parametrize("name", ["meta", "abacus", "cuda:99"])
def test_a_device_that_is_not_usable(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^--device {name}: not usable here \(.*\); use cpu, or see .*doctor`$"):
        options.check_device(name)


def test_a_device_that_is() -> None:
    assert options.check_device("cpu") == "cpu"


@pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")
@pytest.mark.parametrize("name", ["emulated:9", "emulated:x", "emulated:"])
def test_an_emulated_card_has_a_number(name: str) -> None:
    assert options.check_device("emulated") == "npu"
    assert options.check_device("emulated:2") == "npu:2"
    with pytest.raises(ValueError, match=rf"^--device {name}: not usable here \((there are |a device is a type)"):
        options.check_device(name)


SHARE = options.FiniteFloat("a number above 0 and at most 1", min=0, min_open=True, max=1)


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf", "1e400", "0", "-0.5", "1.5", "x", ""])
def test_a_number_that_is_none_or_out_of_its_limits(value: str) -> None:
    with pytest.raises(click.BadParameter) as error:
        SHARE.convert(value, None, None)
    assert error.value.message == f"{value}: must be a number above 0 and at most 1"


def test_a_number_within_its_limits() -> None:
    assert [SHARE.convert(value, None, None) for value in ("1", "0.25", "1e-3")] == [1.0, 0.25, 0.001]
    positive = options.FiniteFloat("a positive number", min=0, min_open=True)
    with pytest.raises(click.BadParameter, match="inf: must be a positive number"):
        positive.convert("inf", None, None)


ELSEWHERE = ("generate", "emulate")
"""Commands that check their numbers in a way of their own; their tests are theirs."""


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ELSEWHERE])
def test_no_number_of_a_command_is_without_limits(name: str) -> None:
    """Neither nan nor a number that no machine can serve."""
    command = main.get_command(click.Context(main), name)
    assert command is not None
    for option in command.params:
        kind = option.type
        assert kind not in (click.FLOAT, click.INT), option.name
        if isinstance(kind, click.FloatRange):
            assert isinstance(kind, options.FiniteFloat), option.name


@pytest.mark.parametrize("workers", [-1, 10**6])
def test_workers_that_no_machine_can_serve(workers: int) -> None:
    result = CliRunner().invoke(main, ["nightly", f"--workers={workers}"])
    assert result.exit_code == 2
    assert "is not in the range" in result.output
