"""Options that several commands share."""

from __future__ import annotations

import pytest

from qwen2_npu.cli import options


@pytest.mark.parametrize("name", ["meta", "abacus", "cuda:99"])
def test_a_device_that_is_not_usable(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^--device {name}: not usable here \(.*\); use cpu, or see .*doctor`$"):
        options.check_device(name)


def test_a_device_that_is() -> None:
    assert options.check_device("cpu") == "cpu"
