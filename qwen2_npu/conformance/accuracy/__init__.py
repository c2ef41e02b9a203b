"""Token-level comparison with the stock model, at every position.

Reading order: ``subject`` and ``model_pair`` (what is compared), ``teacher_forcing`` (how it is run), ``noise`` and
``compare`` (the rule), ``locate_error`` (which step, layer and operator), ``streamed_pair`` and ``layer_by_layer``
(models that do not fit the memory), ``verify`` (all of it, for ``qwen2-npu verify``).
"""
