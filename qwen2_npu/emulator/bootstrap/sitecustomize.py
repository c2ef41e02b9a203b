"""Emulated devices in child processes: this folder is put on PYTHONPATH, and Python runs this file when it starts.

It only arms a hook: the emulator is activated when torch is first imported, so other programs pay nothing. It may be
run by any Python that happens to be started, hence nothing here that an old one does not understand.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
VARIABLE = "QWEN2_NPU_EMULATOR"
FAILED = 2


class _BeforeTorch:
    """A finder that finds nothing: it activates the emulator when torch or torch_npu is looked for."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in ("torch", "torch_npu") or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        if _find("torch", path, target) is None:
            return None
        _activate()
        return _find(name, path, target)


def _find(name, path, target):  # type: ignore[no-untyped-def]
    for finder in list(sys.meta_path):
        spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
        if spec is not None:
            return spec
    return None


def _activate():  # type: ignore[no-untyped-def]
    root = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
    try:
        try:
            from qwen2_npu import emulator
        except ModuleNotFoundError as error:
            if error.name != "qwen2_npu":
                raise
            sys.path.append(root)
            from qwen2_npu import emulator
        emulator.activate_from_environment()
    except Exception as error:
        sys.stderr.write("error: the emulated NPU cannot be provided: %s\n" % (error or repr(error)))
        sys.stderr.flush()
        raise SystemExit(FAILED) from None


def _run_next():  # type: ignore[no-untyped-def]
    """Run the sitecustomize that this one hides, as Python would have."""
    import importlib.machinery

    others = [folder for folder in sys.path if os.path.abspath(folder or os.curdir) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = type(sys)("sitecustomize")
        module.__file__, module.__spec__, module.__loader__ = spec.origin, spec, spec.loader
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get(VARIABLE):
    sys.meta_path.insert(0, _BeforeTorch())
_run_next()
