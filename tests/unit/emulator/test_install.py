"""What is put in place when torch_npu and torchair are imported."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading

import pytest

from qwen2_npu import emulator
from qwen2_npu.emulator import hooks, install

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def test_signal_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with install._own_signal_handlers():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signal_handlers_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)

    def failing_import():
        with install._own_signal_handlers():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise ImportError

    with pytest.raises(ImportError):
        failing_import()
    assert signal.getsignal(signal.SIGTERM) == before


def lose_it(number, frame):
    """As torchair's handler: its own kill is ignored, and so is everything from then on."""
    signal.signal(number, signal.SIG_IGN)
    os.kill(os.getpid(), number)


def test_a_signal_in_the_middle_of_the_import_is_not_lost():
    def import_it():
        with install._own_signal_handlers():
            for number in SIGNALS:
                signal.signal(number, lose_it)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        import_it()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_signals_are_not_held_up():
    before = signal.getsignal(signal.SIGUSR2)
    try:
        with install._own_signal_handlers():
            signal.signal(signal.SIGUSR2, lose_it)
        assert signal.getsignal(signal.SIGUSR2) is lose_it
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_handlers_stay_where_nothing_is_emulated(tmp_path, monkeypatch):
    """As torch_npu's modules on a machine with an NPU."""
    names = ("compiler_of_graphs", "capturer_of_graphs")
    for name in names:
        text = "import signal\nfor number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(install, "TORCHAIR", names[0])
    monkeypatch.setattr(install, "NPUGRAPH_EX", names[1])
    before = [signal.getsignal(number) for number in SIGNALS]
    install.keep_signal_handlers()
    try:
        for name in names:
            importlib.import_module(name)
            assert [signal.getsignal(number) for number in SIGNALS] == before
    finally:
        for name in names:
            sys.modules.pop(name, None)
            hooks._finder.after.pop(name)
            hooks._finder.around.pop(name)


def test_another_thread_has_no_handlers_to_give_back():
    failures = []

    def work():
        try:
            with install._own_signal_handlers():
                pass
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


CODE = """
import signal
from qwen2_npu import emulator

emulator.activate()
mine = lambda *_: None
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, mine)
import torch, torchair, npugraph_ex
assert torchair.core._backend and npugraph_ex.get_npu_backend
print([signal.getsignal(number) is mine for number in (signal.SIGINT, signal.SIGTERM)])
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed")
def test_importing_its_graph_compilers_leaves_the_program_its_handlers():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.endswith("[True, True]\n"), done.stderr[-3000:]


@pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")
def test_torch_npu_does_not_queue():
    assert os.environ["TASK_QUEUE_ENABLE"] == "0"
