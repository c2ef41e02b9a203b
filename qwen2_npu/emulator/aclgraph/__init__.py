"""ACL graphs on the emulated device: capture of what runs on a stream, and its replay on the same memory. Experimental.

``capture`` records, ``captured`` is what was recorded and how it is replayed, ``driver`` connects both with the C side
(``cann/capture.c``), which CANN's functions for capture call.

As on hardware, nothing has been computed when a capture ends: its results are garbage until the first replay, memory
that it wrote is as it was before. A replay uses the addresses, shapes and Python numbers of the capture.
"""

from __future__ import annotations


def install() -> None:
    """Make captures possible; after torch_npu's import."""
    from qwen2_npu.emulator.aclgraph import driver

    driver.install()
