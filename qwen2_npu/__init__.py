"""Qwen2 for Ascend NPUs, with the suite that proves what it computes.

The package's public names are lazy: ``import qwen2_npu`` imports neither torch nor transformers, so that an emulated
device can be activated first. Where torch_npu is installed and no NPU is, importing torch afterwards activates it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qwen2_npu.emulator import automatic

if TYPE_CHECKING:
    from qwen2_npu.cache import FixedKVCache
    from qwen2_npu.graph import compile_model
    from qwen2_npu.models.heads import Qwen2ForSequenceClassification, Qwen2ForTokenClassification, Qwen2Model
    from qwen2_npu.models.qwen2 import Qwen2ForCausalLM
    from qwen2_npu.optimizations import LADDER, Optimizations

__version__ = "0.1.0"

_HOME_OF = {
    "FixedKVCache": "qwen2_npu.cache",
    "LADDER": "qwen2_npu.optimizations",
    "Optimizations": "qwen2_npu.optimizations",
    "Qwen2ForCausalLM": "qwen2_npu.models.qwen2",
    "Qwen2ForSequenceClassification": "qwen2_npu.models.heads",
    "Qwen2ForTokenClassification": "qwen2_npu.models.heads",
    "Qwen2Model": "qwen2_npu.models.heads",
    "compile_model": "qwen2_npu.graph",
}

__all__ = [
    "LADDER",
    "FixedKVCache",
    "Optimizations",
    "Qwen2ForCausalLM",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2Model",
    "__version__",
    "compile_model",
]

automatic.arm()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qwen2_npu' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
