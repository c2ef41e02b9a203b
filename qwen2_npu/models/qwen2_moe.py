"""Qwen2-57B-A14B and its kind: the model of ``qwen2.py`` with the MLPs of ``experts.py``.

``Qwen2ForCausalLM.from_pretrained`` makes one where config.json says ``qwen2_moe``. transformers 4.37.0 has no such
model, so with it there is none here.
"""

from __future__ import annotations

from typing import Any

from qwen2_npu.compat import CONFIGURATIONS
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM


class Qwen2MoeForCausalLM(Qwen2ForCausalLM):
    """See :class:`Qwen2ForCausalLM`; ``fused_moe`` is one more of its switches.

    Args:
        config: a transformers ``Qwen2MoeConfig``.
    """

    config_class: type[Any] = CONFIGURATIONS["qwen2_moe"]
