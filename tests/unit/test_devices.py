"""A device by name: usable, or one line that says why not."""

from __future__ import annotations

import pytest
import torch

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


def test_what_the_user_wrote_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"^--device meta: not usable here \(it holds shapes and no numbers\)"):
        usable("meta", given_as="--device meta")
