"""Lets ``import qwen2_npu`` be enough on a machine without an NPU.

Where torch_npu is installed and CANN is not, ``import torch`` fails: torch loads torch_npu, which finds no libraries of
CANN. ``arm()``, called when qwen2_npu is imported, activates the emulator when torch or torch_npu is imported later.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from qwen2_npu import emulator
from qwen2_npu.emulator.hooks import WrappedLoader, find_elsewhere
from qwen2_npu.emulator.settings import AUTOMATIC

NOTICE = (
    "qwen2_npu: no NPU here, so torch_npu runs on emulated cards, computed on the CPU "
    f"({AUTOMATIC}=0 makes this an error)\n"
)


class _Finder(importlib.abc.MetaPathFinder):
    """Returns torch's and torch_npu's own loaders, wrapped. Importing a module activates; looking one up does not."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in ("torch", "torch_npu"):
            return None
        spec = find_elsewhere(self, name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(WrappedLoader):
    """Activates the emulator where it is needed, then leaves the module to the loader that it would have had."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        # Here and not in exec_module: the emulator must be there before the module is in sys.modules.
        _activate()
        found = importlib.util.find_spec(spec.name)  # with the emulator's own hooks
        assert found is not None
        assert found.loader is not None
        spec.loader = found.loader
        return spec.loader.create_module(spec)


_finder = _Finder()


def arm() -> None:
    """Activate the emulator when torch is imported, where it is needed then. No-op once torch_npu is imported."""
    if "torch_npu" not in sys.modules and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _activate() -> None:
    """Activate where needed, and say so on stderr unless somebody has asked for the emulator before.

    Raises:
        EmulatorError: it is needed and cannot be provided; the next import of torch tries again.
    """
    asked_for = emulator.is_active()
    active = emulator.activate_where_needed()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    if active and not asked_for:
        sys.stderr.write(NOTICE)
