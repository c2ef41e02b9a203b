"""What is put in place when torch_npu and torchair are imported."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading

import pytest

from qwen2_npu import emulator
from qwen2_npu.emulator import install

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
import torch, torchair
assert torchair.core._backend
print([signal.getsignal(number) is mine for number in (signal.SIGINT, signal.SIGTERM)])
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed")
def test_importing_torchair_leaves_the_program_its_handlers():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.endswith("[True, True]\n"), done.stderr[-3000:]


@pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")
def test_torch_npu_does_not_queue():
    assert os.environ["TASK_QUEUE_ENABLE"] == "0"
