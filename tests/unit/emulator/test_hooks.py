"""Running something when a module is imported."""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest

from qwen2_npu.emulator import hooks


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module that is not imported yet, and notes when it is."""
    (tmp_path / "hooked_module.py").write_text("import sys\nsys.hooked_order.append('module')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "hooked_order", [], raising=False)
    yield "hooked_module"
    sys.modules.pop("hooked_module", None)
    hooks._finder.after.pop("hooked_module", None)
    hooks._finder.around.pop("hooked_module", None)


def test_after_and_around_an_import(module):
    order = sys.hooked_order

    @contextlib.contextmanager
    def around():
        order.append("before")
        yield
        order.append("after")

    hooks.after_import(module, lambda found: order.append(found.__name__), around=around)
    assert order == []
    importlib.import_module(module)
    assert order == ["before", "module", "after", module]
    importlib.import_module(module)
    assert len(order) == 4


def test_at_once_where_it_is_imported(module):
    importlib.import_module(module)
    hooks.after_import(module, lambda found: sys.hooked_order.append("now"))
    assert sys.hooked_order == ["module", "now"]


def test_the_module_keeps_its_loader_s_manners(module):
    hooks.after_import(module, lambda found: None)
    spec = importlib.util.find_spec(module)
    assert "hooked_order" in spec.loader.get_source(module)
