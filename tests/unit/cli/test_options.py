"""Options that several commands share."""

from __future__ import annotations

import itertools
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

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


@pytest.mark.parametrize("value", ["c", "a,c", "c,a", ",", ""])
def test_a_name_that_there_is_not_is_refused_wherever_it_stands(value: str) -> None:
    assert options.names_of(" b, a,", ("a", "b")) == ("b", "a")
    with pytest.raises(
        click.BadParameter, match=f"^no step {'c' if 'c' in value else repr(value)}; the steps are a, b$"
    ):
        options.names_of(value, ("a", "b"))


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


# ---- progress without a terminal -------------------------------------------------------------------------------------
class Said:
    """What ``click.echo`` was given, on a clock that goes on by ``pace`` seconds at each look."""

    def __init__(self, pace: float) -> None:
        self.lines: list[str] = []
        self.plain = options.PlainLines(self.echo, itertools.count(0.0, pace).__next__)

    def echo(self, line: str, err: bool) -> None:
        assert err
        self.lines.append(line.rpartition(":")[0])


def test_a_line_for_each_part_as_it_ends() -> None:
    said = Said(pace=1.0)
    said.plain.move("stock", 0, 2)
    said.plain.move("stock, layer 1", 0, 2)
    assert said.lines == []
    said.plain.move("swiglu", 1, 2)
    assert said.lines == ["stock (1/2)"]
    said.plain.move("done", 2, 2)
    said.plain.end()
    assert said.lines == ["stock (1/2)", "swiglu (2/2)"]


def test_what_is_counted_in_many_small_pieces_has_a_line_for_each_name() -> None:
    said = Said(pace=1.0)
    for done, name in enumerate("aaabbbb", start=1):
        said.plain.move(name, done, 7)
    assert said.lines == ["a (4/7)"]
    said.plain.end()
    assert said.lines == ["a (4/7)", "b (7/7)"]


def test_a_part_that_takes_long_says_where_it_is() -> None:
    said = Said(pace=options.PlainLines.QUIET)
    for layer in range(3):
        said.plain.move(f"stock, layer {layer}", 0, 2)
    assert said.lines == ["stock, layer 0 (0/2)", "stock, layer 1 (0/2)"]


def test_a_stream_that_is_gone_changes_nothing() -> None:
    def gone(line: str, err: bool) -> None:
        raise BrokenPipeError

    lines = options.PlainLines(gone)
    lines.move("a", 0, 2)
    lines.move("b", 1, 2)
    lines.end()


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_the_first_rank_speaks_on_stderr(rank: int | None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if rank is not None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
    with options.progress(Console(force_terminal=False), "starting") as progress:
        progress("first", 0, 2)
        progress("second", 1, 2)
        shown = capsys.readouterr()
        assert shown.err == ("" if rank else "first (1/2): 0.0 s\n")
        assert shown.out == ""
    assert capsys.readouterr().err == ("" if rank else "second (2/2): 0.0 s\n")


def test_a_terminal_has_a_bar(capsys: Any) -> None:
    with options.progress(Console(force_terminal=True), "starting") as progress:
        progress("first", 0, 2)
        progress("second", 1, 2)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "second" in shown.out
