"""What may be emulated, and how settings travel."""

from __future__ import annotations

import pytest

from qwen2_npu.emulator.settings import GIB, HBM_GIB, EmulatorError, Settings


def test_a_card_has_its_own_memory():
    assert Settings().hbm_bytes == 32 * GIB
    assert Settings(soc="Ascend910B1").hbm_bytes == HBM_GIB["Ascend910B1"] * GIB
    assert Settings().but(soc="Ascend910B1").hbm_bytes == 64 * GIB
    assert Settings(hbm_bytes=5).but(soc="Ascend910B1").hbm_bytes == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"soc": "Ascend310"}, "soc='Ascend310' is not emulated; one of Ascend910B1"),
        ({"device_count": 0}, "device_count=0: 1 to 64"),
        ({"device_count": 65}, "device_count=65"),
        ({"hbm_bytes": -1}, "hbm_bytes=-1"),
        ({"cann": "newest"}, "cann='newest' is not a version of CANN"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(EmulatorError, match=message):
        Settings(**arguments)


def test_settings_travel_as_json():
    settings = Settings("Ascend910B2", 3, 7 * GIB, "9.0.0")
    assert Settings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize("text", ["{", "[]", '{"card": 1}', '{"soc": "x"}'])
def test_a_variable_that_holds_something_else_is_named(text):
    with pytest.raises(EmulatorError, match=r"QWEN2_NPU_EMULATOR=.*does not hold emulator settings"):
        Settings.from_json(text)
