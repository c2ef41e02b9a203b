"""Options that several commands share."""

from __future__ import annotations

import pytest

from qwen2_npu import emulator
from qwen2_npu.cli import options


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
