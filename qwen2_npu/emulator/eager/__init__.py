"""Eager mode on the emulated device: kernels of torch_npu's operators that compute on the CPU.

``memory`` sees device memory from the CPU, ``plan`` reads a schema, ``rule`` makes a kernel of both, ``registration``
gives every operator one. What torch_npu's own operators mean is in ``operators``, one file per family, ``gradients``
differentiates them, ``extra`` has what does not follow the rule, ``refused`` what is not computed, and why. ``random``
draws numbers, ``tap`` lets graph capture and fault injection listen.
"""

from __future__ import annotations


def install() -> None:
    """Replace torch_npu's kernels by emulated ones."""
    from qwen2_npu.emulator.eager import registration

    registration.register_all()
