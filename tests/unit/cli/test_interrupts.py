"""Ctrl-C at moments when Python's exception of it gets lost, and a command that ends anyway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qwen2_npu import Qwen2ForCausalLM, emulator
from qwen2_npu.cli import INTERRUPTED, interrupts, main
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.layer_by_layer import LayerByLayer
from qwen2_npu.conformance.accuracy.model_pair import ModelPair
from qwen2_npu.conformance.machine.environment import Environment
from qwen2_npu.conformance.perf import documented, protocol
from qwen2_npu.emulator import install
from tests.unit.cli.test_cli import small_folder

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def press() -> None:
    signal.raise_signal(signal.SIGINT)


class Finalised:
    def __del__(self) -> None:
        press()


def in_a_finaliser() -> None:
    """As the regex module's objects have them: Python prints "Exception ignored in" and goes on."""
    Finalised()


def in_a_weakref_callback() -> None:
    """As of weakref.finalize, which torch's libraries use."""
    thing = Finalised.__new__(type("Plain", (), {"__slots__": ("__weakref__",)}))
    reference = weakref.ref(thing, lambda _: press())
    del thing
    assert reference() is None


def where_everything_is_caught() -> None:
    """As C extensions clear what fails while they start."""
    try:
        press()
    except BaseException:
        return
    raise AssertionError("nothing was raised")


def as_another_error() -> None:
    """As transformers' lazy modules fail."""
    try:
        press()
    except BaseException as error:
        raise ModuleNotFoundError("Could not import module 'AutoModel'") from error


LOST = [in_a_finaliser, in_a_weakref_callback, where_everything_is_caught]
EVERY = pytest.mark.parametrize("lose", [*LOST, as_another_error], ids=lambda lose: lose.__name__)
ONE = pytest.mark.parametrize("lose", LOST[:1], ids=lambda lose: lose.__name__)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def lost_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, lose: Callable[[], None]) -> None:
    """Whenever ``owner.name`` is called an interrupt is lost, and the work goes on."""
    right = getattr(owner, name)

    def work(*given: Any, **named: Any) -> Any:
        lose()
        return right(*given, **named)

    monkeypatch.setattr(owner, name, work)


def assert_aborted(result: Result) -> None:
    assert result.exit_code == INTERRUPTED, result.output
    assert result.stderr.endswith("Aborted!\n")
    assert "Traceback" not in result.output
    assert "passed" not in result.output
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_folder(tmp_path / "model")


@EVERY
@pytest.mark.parametrize(
    ("owner", "name"), [(ModelPair, "of_checkpoint"), (Environment, "of")], ids=["early", "after the last step"]
)
def test_verify_neither_passes_nor_writes(
    owner: type, name: str, lose: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost_at(monkeypatch, owner, name, lose)
    report = folder / "verify.json"
    assert_aborted(run("verify", "--model-path", folder, "--device", "cpu", "--steps", "swiglu", "--json", report))
    assert not report.exists()


@ONE
def test_verify_stops_at_the_next_layer(
    lose: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[int] = []
    lost_at(monkeypatch, LayerByLayer, "_parts", lambda: (layers.append(1), lose()))  # type: ignore[arg-type]
    report = folder / "verify.json"
    assert_aborted(run("verify", "--stream", "--model-path", folder, "--device", "cpu", "--json", report))
    assert len(layers) == 1
    assert not report.exists()


@EVERY
def test_generate_stops_before_its_first_token(lose: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    lost_at(monkeypatch, Qwen2ForCausalLM, "from_pretrained", lose)
    monkeypatch.setattr(Qwen2ForCausalLM, "generate", lambda *given, **named: pytest.fail("it went on"))
    assert_aborted(run("generate", "--prompt", "Once upon", "--device", "cpu"))


@ONE
def test_generate_stops_at_the_next_token(lose: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def once() -> None:
        steps.append(1)
        if len(steps) == 2:
            lose()

    lost_at(monkeypatch, Qwen2ForCausalLM, "forward", once)
    assert_aborted(run("generate", "--prompt", "Once upon", "--device", "cpu", "--max-new-tokens", 50))
    assert len(steps) == 2


@ONE
def test_bench_keeps_the_cases_before_it(
    lose: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, path = protocol.measure, tmp_path / "bench.json"

    def measure(model: Any, *, batch: int, **named: Any) -> Any:
        if batch == 2:
            lose()
        return right(model, batch=batch, **named)

    monkeypatch.setattr(protocol, "measure", measure)
    case = ("--model-path", tiny.path(), "--device", "cpu", "--input-len", 8, "--output-len", 4, "--steps", "swiglu")
    assert_aborted(run("bench", *case, "--batch", "1,2,4", "--json", path))
    assert [result["batch"] for result in json.loads(path.read_text(encoding="utf-8"))["results"]] == [1]


@EVERY
def test_a_command_without_steps_does_not_end_well(lose: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    lost_at(monkeypatch, documented, "read", lose)
    assert_aborted(run("baselines"))


def test_an_interrupt_that_is_not_lost_has_the_same_status(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_at(monkeypatch, documented, "read", press)
    assert_aborted(run("baselines"))


def test_interrupts_that_are_ignored_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a program in a script's background."""
    lost_at(monkeypatch, documented, "read", press)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("baselines").exit_code == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("active", [True, False])
def test_a_real_npu_s_graph_compilers_leave_the_handlers_alone_too(
    active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(emulator, "activate_where_needed", lambda: active)
    monkeypatch.setattr(emulator, "is_active", lambda: active)
    monkeypatch.setattr(install, "keep_signal_handlers", lambda: called.append(True))
    assert run("baselines").exit_code == 0
    assert bool(called) != active


def test_the_next_command_knows_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        lost_at(patch, documented, "read", press)
        assert_aborted(run("baselines"))
    assert run("baselines").exit_code == 0
    interrupts.check()


# ---- real processes, which import everything anew --------------------------------------------------------------------
LOST_IN_AN_IMPORT = """
import signal, sys

class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.torch_version":
            sys.meta_path.remove(self)
            Finalised()

sys.meta_path.insert(0, Finder())
from qwen2_npu.cli import main
main(sys.argv[1:], prog_name="qwen2-npu")
"""


def test_an_interrupt_while_torch_and_transformers_are_imported_ends_the_process(tmp_path: Path) -> None:
    report = tmp_path / "verify.json"
    command = [sys.executable, "-c", LOST_IN_AN_IMPORT, "verify", "--device", "cpu", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr[-2000:]
    assert "passed" not in done.stdout
    assert not report.exists()


@pytest.mark.parametrize("library", ["libtorch_cpu", "libtorch_python"])
def test_an_interrupt_from_outside_in_a_cold_start(library: str, tmp_path: Path) -> None:
    """When the process has just loaded ``library``."""
    report = tmp_path / "verify.json"
    command = [sys.executable, "-m", "qwen2_npu.cli", "verify", "--device", "cpu", "--json", str(report)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while library not in maps.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, INTERRUPTED), out[-2000:]
    assert "passed" not in out
    assert not report.exists()
