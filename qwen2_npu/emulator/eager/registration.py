"""Which kernel each of torch_npu's operators gets on the emulated device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qwen2_npu.emulator.eager import extra
from qwen2_npu.emulator.eager.refused import REASONS
from qwen2_npu.emulator.eager.rule import kernel_for

KEY = "PrivateUse1"
AUTOGRAD_KEY = "AutogradPrivateUse1"

_OWN = """
    empty.memory_format empty_strided empty_like new_empty_strided empty_with_format unsafe_empty_with_format
    empty_with_swapped_memory as_strided as_strided_ view _reshape_alias _unsafe_view resize_ resize_as_ set_
    set_.source_Storage set_.source_Storage_storage_offset set_.source_Tensor set_.source_Tensor_storage_offset
    _local_scalar_dense record_stream is_pinned _pin_memory unfold view_as_real view_as_complex alias detach
    is_set_to _has_same_storage_numel get_npu_format get_storage_size npu_change_data_ptr
"""
OWN = frozenset(_OWN.split())
"""Allocation, metadata and scalar reads: torch_npu's own kernels, which work on the emulated runtime."""

NAMESPACES_OF_COLLECTIVES = ("c10d", "npu_custom_dist", "symm_mem")

_libraries: list[torch.library.Library] = []
_computed: set[str] = set()
refused: set[str] = set()
"""Qualified names of the operators that were given a kernel that only raises."""


def register_all() -> None:
    """Replace torch_npu's kernels. Once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        libraries: dict[str, torch.library.Library] = {}
        for op, kernel in kernels():
            namespace = op.namespace
            if namespace not in libraries:
                libraries[namespace] = torch.library.Library(namespace, "IMPL")
            libraries[namespace].impl(op, kernel, KEY, allow_override=True)
            if hasattr(kernel, "refuses"):
                refused.add(kernel.refuses)
            else:
                _computed.update((op._schema.name, op.name()))
        for qualified in extra.DECOMPOSED:
            namespace, _, name = qualified.partition("::")
            composite = overload(namespace, name)
            if composite is not None:
                around = extra.AROUND.get(qualified, lambda kernel: kernel)
                libraries[namespace].impl(composite, around(decomposed(composite)), AUTOGRAD_KEY, allow_override=True)
    _libraries.extend(libraries.values())


def kernels() -> Iterator[tuple[torch._ops.OpOverload, Callable[..., Any]]]:
    """Every operator that gets a kernel here, with it."""
    from qwen2_npu import ops

    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key(KEY):
        namespace, _, name = qualified.partition("::")
        if namespace in NAMESPACES_OF_COLLECTIVES or name in OWN:
            continue
        op = overload(namespace, name)
        if op is None:
            continue
        if name in extra.DEVICE_TABLE:
            yield op, extra.DEVICE_TABLE[name]
            continue
        compute = extra.TABLE.get(name)
        if compute is None and namespace == "npu":
            compute = ops.kernels.get(name)
        if compute is not None:
            yield op, kernel_for(op, compute)
        elif runs_on_cpu(op):
            yield op, kernel_for(op)
        else:
            yield op, refusal(op)


def has_kernel(name: str) -> bool:
    """Whether an operator, or with a ``.`` in its name an overload, is computed by a kernel of this package."""
    return name in _computed


def overload(namespace: str, name: str) -> torch._ops.OpOverload | None:
    """The operator of a qualified name; None for a name without a schema."""
    packet_name, _, overload_name = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace), packet_name, None)
    return None if packet is None else getattr(packet, overload_name or "default", None)


def runs_on_cpu(op: torch._ops.OpOverload) -> bool:
    """Whether the dispatcher has something to compute ``op`` with on CPU tensors."""
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), "CPU")


def decomposed(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """PyTorch's own kernel of a composite operator, which calls others."""

    def decompose(*args: Any, **kwargs: Any) -> Any:
        return op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    return decompose


def refusal(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """A kernel that names the operator it does not compute, and why."""
    name = op._schema.name if op._overloadname == "default" else f"{op._schema.name}.{op._overloadname}"
    reason = REASONS.get(name, "PyTorch has no CPU kernel for it")

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"{op} is not supported on the emulated NPU: {reason}. "
            "Write it with supported operators, or add it to qwen2_npu/emulator/eager/operators"
        )

    refuse.refuses = name  # type: ignore[attr-defined]
    return refuse
