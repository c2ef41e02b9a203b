"""Token-level comparison with the stock model, at every position.

Reading order: ``model_pair`` (what is compared), ``teacher_forcing`` (how it is run), ``noise`` and ``compare`` (the
rule), ``locate_error`` (which step, layer and operator), ``verify`` (all of it, for ``qwen2-npu verify``).
"""
