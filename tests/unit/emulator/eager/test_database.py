"""PyTorch's own operator database on CPU and on the emulated NPU: the same results, gradients and written arguments."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from qwen2_npu.emulator import faults
from tests.unit.emulator.eager import opinfo

EXCEPTIONS: dict[str, dict[str, str]] = tomllib.loads((Path(__file__).parent / "exceptions.toml").read_text())

COMPARED = {"forward": 688, "gradient": 532, "inplace": 160, "out": 345, "bfloat16": 540, "int64": 455}
"""Mode -> operators that must be compared at least, so that a sweep that skips what it should run does not pass."""

_FORWARD = """
    __getitem__ add addmm any arange argsort bernoulli bmm cat clone complex cumsum diagonal div.no_rounding_mode einsum
    eq expand fft.rfft flip gather index_add index_put isin linalg.inv linspace logsumexp masked_select matmul
    max.reduction_with_dim median multinomial nan_to_num native_layer_norm nn.functional.conv2d nn.functional.dropout
    nn.functional.embedding nn.functional.linear nn.functional.one_hot nonzero norm randint_like randn
    repeat_interleave reshape scatter scatter_add sort split stft sum topk tril unbind unfold unique view
    view_as_complex where _foreach_add _foreach_norm
"""
_GRADIENT = """
    addmm cat cumsum gather index_put matmul nn.functional.batch_norm nn.functional.conv2d nn.functional.cross_entropy
    nn.functional.embedding nn.functional.group_norm nn.functional.layer_norm nn.functional.linear norm
    nn.functional.scaled_dot_product_attention repeat_interleave nn.functional.softmin.with_dtype stft where
"""
FAST = [(name, "forward") for name in _FORWARD.split()] + [(name, "gradient") for name in _GRADIENT.split()]
"""Families of operators that ordinary scripts use; test_every_operator takes the rest."""


def test_the_fast_names_exist():
    assert not {name for name, _ in FAST} - opinfo.database().keys()


@pytest.mark.parametrize(("name", "mode"), FAST)
def test_representative_operators(name, mode):
    assert opinfo.check(name, mode, 1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMPARED)
def test_every_operator(mode):
    found: dict[str, str] = {}
    compared = 0
    for name in opinfo.database():
        try:
            compared += opinfo.check(name, mode, 2) > 0
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    fresh = {name: why for name, why in found.items() if name not in EXCEPTIONS.get(mode, {})}
    assert not fresh, "these operators differ or fail: " + "; ".join(f"{name}: {why}" for name, why in fresh.items())
    healed = EXCEPTIONS.get(mode, {}).keys() - found.keys()
    assert not healed, f"these work now, take them out of exceptions.toml: {sorted(healed)}"
    assert compared >= COMPARED[mode]


@pytest.mark.parametrize(
    ("name", "mode", "operator"), [("tanh", "forward", "aten::tanh"), ("mm", "gradient", "aten::mm")]
)
def test_a_perturbed_operator_is_seen(name, mode, operator):
    with faults.perturbed(operator, 1e-3), pytest.raises(AssertionError):
        opinfo.check(name, mode, 1)


def test_a_result_full_of_nan_is_seen():
    with faults.nan("aten::softplus"), pytest.raises(AssertionError):
        opinfo.check("nn.functional.softplus", "forward", 1)
