"""Eager mode on the emulated device: kernels of torch_npu's operators that compute on the CPU.

``memory`` sees device memory from the CPU, ``plan`` reads a schema, ``rule`` makes a kernel of both, ``registration``
gives every operator one, ``extra`` says what torch_npu's own operators mean, ``random`` draws numbers, ``tap`` lets
graph capture and fault injection listen.
"""

from __future__ import annotations


def install() -> None:
    """Replace torch_npu's kernels by emulated ones."""
    from qwen2_npu.emulator.eager import registration

    registration.register_all()
