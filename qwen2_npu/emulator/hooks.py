"""Runs a function right after a module was imported for the first time, whoever imports it."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType

Around = Callable[[], AbstractContextManager[object]]


class _Finder(importlib.abc.MetaPathFinder):
    """Returns a module's own loader, wrapped."""

    def __init__(self) -> None:
        self.after: dict[str, Callable[[ModuleType], None]] = {}
        self.around: dict[str, Around] = {}
        self.looking: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.after or name in self.looking:
            return None
        self.looking.add(name)
        try:
            spec = find_elsewhere(self, name, path, target)
        finally:
            self.looking.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.after[name], self.around.get(name, contextlib.nullcontext))
        return spec


def find_elsewhere(
    asking: importlib.abc.MetaPathFinder, name: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    """What the first other finder on ``sys.meta_path`` that knows ``name`` says."""
    for finder in [finder for finder in sys.meta_path if finder is not asking]:
        spec = finder.find_spec(name, path, target)
        if spec is not None:
            return spec
    return None


class WrappedLoader(importlib.abc.Loader):
    """Delegates everything to ``loader``."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class _Loader(WrappedLoader):
    """Runs the module's code inside ``around()``, and calls ``after`` then."""

    def __init__(self, loader: importlib.abc.Loader, after: Callable[[ModuleType], None], around: Around) -> None:
        super().__init__(loader)
        self._after, self._around = after, around

    def exec_module(self, module: ModuleType) -> None:
        with self._around():
            super().exec_module(module)
        self._after(module)


_finder = _Finder()


def after_import(name: str, call: Callable[[ModuleType], None], around: Around = contextlib.nullcontext) -> None:
    """Call ``call(module)`` after ``name`` is imported; at once where it is already.

    Args:
        around: makes a context manager that the module's own code runs in.
    """
    if name in sys.modules:
        call(sys.modules[name])
        return
    _finder.after[name] = call
    _finder.around[name] = around
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
