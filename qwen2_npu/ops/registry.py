"""Makes torch.ops.npu.* run on CPU and CUDA tensors, with or without torch_npu.

Without torch_npu the `npu` operators are defined here, each with one composite kernel: PyTorch then sees through it
everywhere (eager, meta and fake tensors, functionalisation, torch.compile). With torch_npu the operators are its own
and so are their NPU, meta and graph rules; only CPU and CUDA tensors come to these kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qwen2_npu.ops.schemas import LIBRARY, SCHEMAS

# Autograd keys, too, so that tracing on a CPU or CUDA tensor sees through the operator before it is functionalised:
# in a compiled graph the in-place rotary embedding would otherwise write into buffers that the graph may reuse.
BESIDE_TORCH_NPU = ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA")
ALONE = ("CompositeImplicitAutograd",)


def register(kernels: Mapping[str, Callable[..., Any]]) -> torch.library.Library:
    """Define the operators that nobody has defined yet and give each its kernel.

    The result must be kept: the registrations end with it.
    """
    library = torch.library.Library(LIBRARY, "FRAGMENT")
    namespace = getattr(torch.ops, LIBRARY)
    for name, kernel in kernels.items():
        defined = hasattr(namespace, name)
        if not defined:
            library.define(SCHEMAS[name])
        for key in BESIDE_TORCH_NPU if defined else ALONE:
            library.impl(name, kernel, key)
    return library
