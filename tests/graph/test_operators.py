"""The installed torchair can lower every operator of the model: converter, meta kernel, schema."""

from __future__ import annotations

import pytest
import torch

from qwen2_npu.ops import SCHEMAS

IN_GRAPHS = sorted(name for name in SCHEMAS if name != "scatter_update_")
"""scatter_update_ is functionalised: graphs hold scatter_update."""


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_has_a_converter(name: str) -> None:
    import torchair  # noqa: F401 - registers the converters
    from torchair._ge_concrete_graph.fx2ge_converter import _get_converter

    assert _get_converter(getattr(torch.ops.npu, name).default) is not None
    assert _get_converter(torch.ops.npu.npu_format_cast_.default) is None, "this check could not fail"


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_has_a_meta_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Meta")


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schema_is_the_snapshot(name: str) -> None:
    """The live wheel against what this project was written for."""
    assert str(getattr(torch.ops.npu, name).default._schema) == f"npu::{SCHEMAS[name]}"
