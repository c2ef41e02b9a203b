"""Each question on this machine: it can be asked, its answer can be either, and the kernels do what is assumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwen2_npu.conformance.machine.bug_report import device_probes
from qwen2_npu.conformance.machine.bug_report.device_probes import QUESTIONS

BY_NAME = {probe.name: probe for probe in QUESTIONS}
IN_GRAPHS = [name for name in BY_NAME if "graph" in name]
HARDWARE = [name for name, probe in BY_NAME.items() if probe.real_npu_only]
EAGER = [name for name in BY_NAME if name not in IN_GRAPHS + HARDWARE]


def ask(name: str, device: str) -> device_probes.Answer:
    return BY_NAME[name].ask(device)


@pytest.mark.parametrize("name", EAGER)
def test_in_eager(name: str, device: str) -> None:
    answer = ask(name, device)
    assert answer.text
    if BY_NAME[name].assumed:
        assert answer.as_assumed, answer


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_GRAPHS)
def test_in_graphs(name: str, device: str) -> None:
    assert ask(name, device).as_assumed


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(QUESTIONS)


# ---- negative controls: a device that does otherwise is seen to -----------------------------------------------------
class Fake:
    """The operators with one replaced."""

    def __init__(self, name: str, operator: Callable[..., Any]) -> None:
        self._name, self._operator, self._ops = name, operator, torch.ops.npu

    def __getattr__(self, name: str) -> Any:
        return self._operator if name == self._name else getattr(self._ops, name)


def softmax_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    q, k, v = (tensor.float().transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


OTHERWISE: dict[str, tuple[str, Callable[..., Any], str]] = {
    "rotary_in_eager": (
        "npu_apply_rotary_pos_emb",
        lambda query, key, **_: (query.clone(), key.clone()),
        "out of place",
    ),
    "pfa_default_call": ("npu_prompt_flash_attention", softmax_causal, "causal"),
    "pfa_row_without_a_live_key": (
        "npu_prompt_flash_attention",
        lambda query, *_, **__: query * torch.nan,
        "not finite",
    ),
    "ifa_row_without_a_live_key": ("npu_incre_flash_attention", lambda query, *_, **__: query * 0, "zeros"),
    "swiglu_rounding": (
        "npu_swiglu",
        lambda x: torch.nn.functional.silu(x[..., :1024].float()).to(x.dtype) * x[..., 1024:],
        "rounded after silu",
    ),
    "add_rms_norm_rounding": (
        "npu_add_rms_norm",
        lambda x1, x2, gamma, eps: (torch.nn.functional.rms_norm((x1 + x2).float(), x1.shape[-1:], gamma.float(), eps)
                                    .to(x1.dtype), None, x1),
        "rounded once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_device_that_does_otherwise_is_seen(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, replacement, text = OTHERWISE[name]
    monkeypatch.setattr(device_probes, "OPS", Fake(operator, replacement))
    answer = ask(name, device)
    assert answer.text == text
    assert answer.as_assumed is False


def test_a_write_past_the_end_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, axis: int) -> None:
        whole = torch.as_strided(data, (8, 2, 128), (256, 128, 1))
        whole[int(indices[0])] = updates[0, 0]

    monkeypatch.setattr(device_probes, "OPS", Fake("scatter_update_", unchecked))
    assert ask("scatter_past_the_end", device).text == "no error; 256 elements of the next row were written"
