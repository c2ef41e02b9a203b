"""What may be emulated, and how settings travel."""

from __future__ import annotations

import json

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
        ({"soc": "Ascend310"}, "soc='Ascend310' is not emulated; it must be one of Ascend910B1"),
        ({"device_count": 0}, "device_count=0 must be an integer from 1 to 64"),
        ({"device_count": 65}, "device_count=65"),
        ({"hbm_bytes": -1}, "hbm_bytes=-1"),
        ({"cann": "newest"}, "cann='newest' is not a version of CANN"),
        ({"cann": "٨.٥.٠"}, "cann='٨.٥.٠' is not a version of CANN"),
        ({"cann": 8.5}, "cann=8.5 is not"),
        ({"soc": []}, r"soc=\[\] is not emulated"),
        ({"soc": {"Ascend910B4": 1}}, "soc={'Ascend910B4': 1} is not emulated"),
        ({"soc": None}, "soc=None is not emulated"),
        ({"device_count": True}, "device_count=True must be an integer from 1 to 64"),
        ({"device_count": 2.0}, "device_count=2.0 must be an integer from 1 to 64"),
        ({"device_count": "2"}, "device_count='2' must be an integer from 1 to 64"),
        ({"hbm_bytes": True}, "hbm_bytes=True must be a size in bytes"),
        ({"hbm_bytes": False}, "hbm_bytes=False must be a size in bytes"),
        ({"hbm_bytes": 4e9}, "hbm_bytes=4000000000.0 must be a size in bytes"),
        ({"hbm_bytes": float("nan")}, "hbm_bytes=nan must be a size in bytes"),
        ({"hbm_bytes": float("inf")}, "hbm_bytes=inf must be a size in bytes"),
        ({"hbm_bytes": 1 << 63}, f"hbm_bytes={1 << 63} must be a size in bytes"),
        ({"hbm_bytes": None}, "hbm_bytes=None must be a size in bytes"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(EmulatorError, match=message):
        Settings(**arguments)
    with pytest.raises(EmulatorError, match=message):
        Settings.from_json(json.dumps(arguments))


def test_settings_travel_as_json():
    settings = Settings("Ascend910B2", 3, 7 * GIB, "9.0.0")
    assert Settings.from_json(settings.to_json()) == settings


NOT_SETTINGS = {
    "no JSON": "{",
    "a list": "[]",
    "another name": '{"card": 1}',
    "another card": '{"soc": "x"}',
    "a number": "1",
    "null": "null",
    "nan": "NaN",
    "deep": "[" * 100_000,
    "deep and closed": "[" * 20_000 + "]" * 20_000,
    "deep inside": '{"soc": ' + '{"a": ' * 20_000 + "1" + "}" * 20_001,
    "almost too deep": '{"soc": ' + "[" * 900 + "]" * 900 + "}",
    "many digits": '{"hbm_bytes": ' + "9" * 4000 + "}",
    "too many digits": '{"hbm_bytes": ' + "9" * 5000 + "}",
    "long": '{"cann": "' + "8" * 50_000 + '"}',
    "no text": '{"cann": "\udcff"}',
}


@pytest.mark.parametrize("text", NOT_SETTINGS.values(), ids=NOT_SETTINGS)
def test_a_variable_that_holds_something_else_is_named(text):
    with pytest.raises(EmulatorError, match=r"QWEN2_NPU_EMULATOR=.*does not hold emulator settings"):
        Settings.from_json(text)


@pytest.mark.parametrize("text", NOT_SETTINGS.values(), ids=NOT_SETTINGS)
def test_its_message_is_one_short_line(text):
    with pytest.raises(EmulatorError) as caught:
        Settings.from_json(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    message.encode()
