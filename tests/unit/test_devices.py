"""A device by name: usable, or one line that says why not."""

from __future__ import annotations

import re

import pytest
import torch

from qwen2_npu import devices
from qwen2_npu.devices import usable
from qwen2_npu.errors import UnsupportedError


def test_a_usable_device(device: str) -> None:
    assert usable(device).type == torch.device(device).type
    assert usable(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "meta", "", "cuda:99", 3.5])
def test_the_others_are_named_with_the_way_out(name: object) -> None:
    with pytest.raises(UnsupportedError, match=rf"^device={name!r}: not usable here \(.+\); use cpu") as caught:
        usable(name)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


FORM = "a device is a type, or a type and a number, such as cpu, npu and npu:1"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, FORM) for name in ("", "npu:", "npu:x", "npu:-1", "npu:01", "npu: 1", " npu", "NPU", "npu:1:2", "0")),
        ("abacus", "torch knows no type of device 'abacus'"),
        ("abacus:1", "torch knows no type of device 'abacus'"),
        ("cpu:3", "there is one cpu, without a number"),
        ("meta:1", "it holds shapes and no numbers"),
        ("vulkan", "this torch was built without vulkan"),
    ],
)
def test_the_reason_is_in_our_words(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        usable(name)
    assert str(caught.value) == f"device={name!r}: not usable here ({reason}); use cpu, or see `qwen2-npu doctor`"


@pytest.mark.parametrize(
    ("count", "number", "reason"),
    [
        (8, 8, "there are 8 npu devices, npu:0 to npu:7"),
        (8, 300, "there are 8 npu devices, npu:0 to npu:7"),
        (1, 1, "there is one npu device, npu:0"),
        (0, 0, "there is no npu device"),
    ],
)
def test_a_card_that_is_not_there(count: int, number: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch, "npu"):
        pytest.skip("torch_npu is not installed")
    monkeypatch.setattr(torch.npu, "device_count", lambda: count)
    for name in (f"npu:{number}", *((number, torch.device("npu", number)) if number < 128 else ())):
        with pytest.raises(UnsupportedError, match=re.escape(reason)):
            usable(name)


def test_a_number_on_a_machine_without_such_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UnsupportedError, match=r"^device='cuda:9': not usable here \(there is no cuda device\)"):
        usable("cuda:9")


def test_an_npu_without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_is_type", lambda kind: False)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"npu:1'.*\(it needs torch_npu, which is missing: pip install"):
        usable("npu:1")


def test_the_cpu_has_one_name() -> None:
    assert usable("cpu:0") == torch.device("cpu")


def test_what_the_user_wrote_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"^--device meta: not usable here \(it holds shapes and no numbers\)"):
        usable("meta", given_as="--device meta")
