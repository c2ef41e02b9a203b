"""Compilation of the model's two steps, prefill and decode.

Only the steps are compiled: one graph per (batch, prompt bucket) and one per (batch, cache bucket). Everything that
runs once per call on the host (row compaction, masks, cache accounts) stays outside. The KV caches are graph inputs,
updated in place at the addresses they were allocated at.

``inductor`` compiles for CPU and CUDA, ``torchair`` for Ascend NPUs (GE graph), ``npugraph_ex`` for Ascend NPUs by
capture and replay of eager operators (ACL graph; experimental). The caller's code is the same for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen2_npu.compat import expert_count
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.graph.steps import CompiledStep
from qwen2_npu.optimizations import MODES, MODES_OF, Optimizations

if TYPE_CHECKING:
    import torch

    from qwen2_npu.models.qwen2 import Qwen2ForCausalLM

__all__ = ["MODES", "GraphOptions", "check_mode", "compile_model", "parse_dynamic", "parse_mode"]

EXE_MODE, DYNAMIC_COMPILE = "EXE_MODE", "DYNAMIC_COMPILE"
"""Environment variables of the upstream guide: the mode, and whether graphs are dynamic, when not passed."""

ALIASES = {"dynamo": "torchair"}
"""What the guide writes into EXE_MODE -> the mode it means."""

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class GraphOptions(NamedTuple):
    """How graphs are compiled. ``None`` means: as the guide does for the model's optimizations.

    Attributes:
        dynamic: whether the live lengths, integers on the host, may change without a new graph. Needed by
            ``ifa_tiling``; tensors are static either way.
        frozen_parameter: torchair: weights are constants of the graph, whose layout the compiler may choose.
        tiling_schedule_optimize: torchair: tiling is computed on the device ("tiling sunk"); needs ``dynamic``.
        cache_dir: torchair: folder where compiled graphs are kept for the next start; None keeps none.
    """

    dynamic: bool
    frozen_parameter: bool
    tiling_schedule_optimize: bool
    cache_dir: Path | None


def parse_mode(mode: str | None) -> str:
    """``mode``, or what EXE_MODE says, or "eager".

    Raises:
        UnsupportedError: an unknown mode, with the known ones.
    """
    source = f"mode={mode!r}" if mode is not None else f"{EXE_MODE}={os.environ.get(EXE_MODE)!r}"
    chosen = mode if mode is not None else os.environ.get(EXE_MODE, "eager")
    chosen = ALIASES.get(chosen, chosen)
    if chosen not in MODES:
        raise UnsupportedError(f"{source}: supported modes are {', '.join(MODES)}")
    return chosen


def check_mode(mode: str, device: torch.device, optimizations: Optimizations | None = None, config: Any = None) -> None:
    """Refuse a mode before a model is built or compiled for it.

    Args:
        mode: one of :data:`MODES`.
        optimizations: of the model; None where it is the stock one.
        config: of the model, where it is known.

    Raises:
        UnsupportedError: ``device``, this machine or the model lacks it.
    """
    takes = MODES_OF.get(device.type, ("eager",))
    if mode == "eager":
        return
    if mode in MODES_OF["npu"]:
        from qwen2_npu.graph import npu

        npu.check_installed(mode, takes)
    if mode not in takes:
        targets = " and ".join(kind.upper() for kind, modes in MODES_OF.items() if mode in modes)
        raise UnsupportedError(
            f"mode={mode!r} compiles for {targets.replace('NPU', 'NPUs')}, and the device is {device}, whose modes are "
            f"{', '.join(takes)}: take one of them, or another device"
        )
    if optimizations is not None and not optimizations.fixed_kv_cache:
        raise UnsupportedError(
            f"mode={mode!r} needs the fixed_kv_cache step: with a growing cache every decode step has new "
            "shapes and would compile again; use optimizations with fixed_kv_cache on"
        )
    if optimizations is not None and config is not None and expert_count(config) and not optimizations.fused_moe:
        raise UnsupportedError(
            f"mode={mode!r} needs the fused_moe step for a mixture of experts: without it the host looks up which "
            "experts the tokens go to, which no graph can; use optimizations with fused_moe on"
        )


def parse_dynamic(dynamic: bool | None, needed: bool) -> bool:
    """``dynamic``, or what DYNAMIC_COMPILE says, or ``needed``.

    Raises:
        UnsupportedError: no boolean, or False where the optimizations need True.
    """
    source = f"dynamic={dynamic!r}"
    if dynamic is None and DYNAMIC_COMPILE in os.environ:
        text = os.environ[DYNAMIC_COMPILE]
        source = f"{DYNAMIC_COMPILE}={text!r}"
        if text.lower() not in BOOLEANS:
            raise UnsupportedError(f"{source} must be True or False")
        dynamic = BOOLEANS[text.lower()]
    chosen = needed if dynamic is None else dynamic
    if needed and not chosen:
        raise UnsupportedError(
            f"{source}: the ifa_tiling step passes the live lengths as integers, and a static graph would be compiled "
            "again every decode step; leave it out, or switch ifa_tiling off"
        )
    return chosen


def compile_model(
    model: Qwen2ForCausalLM,
    mode: str | None = None,
    *,
    dynamic: bool | None = None,
    frozen_parameter: bool = True,
    tiling_schedule_optimize: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Qwen2ForCausalLM:
    """Compile prefill and decode of ``model``, in place; the caller's code stays the same.

    Args:
        mode: one of :data:`MODES`; "eager" compiles nothing; None takes it from EXE_MODE.
        dynamic: see :class:`GraphOptions`; None takes it from DYNAMIC_COMPILE, else True with ``ifa_tiling``.
        frozen_parameter: see :class:`GraphOptions`.
        tiling_schedule_optimize: see :class:`GraphOptions`; None means with ``ifa_tiling``.
        cache_dir: see :class:`GraphOptions`. Files there are read back as code: use a folder only you can write.

    Returns:
        ``model``.

    Raises:
        UnsupportedError: an unknown mode, one that this machine or device lacks, a model whose cache is not fixed: its
            shapes change every step, or a mixture of experts without ``fused_moe``.
    """
    chosen = parse_mode(mode)
    model.compiled_steps = {}
    if chosen == "eager":
        return model
    check_mode(chosen, model.device, model.optimizations, model.config)
    sunk = model.optimizations.ifa_tiling
    options = GraphOptions(
        dynamic=parse_dynamic(dynamic, sunk),
        frozen_parameter=frozen_parameter,
        tiling_schedule_optimize=sunk if tiling_schedule_optimize is None else tiling_schedule_optimize,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    compiler = _compiler(chosen, model, options)
    model.compiled_steps = {
        "prefill": CompiledStep(model.prefill_step, compiler),
        "decode": CompiledStep(model.decode_step, compiler),
    }
    return model


def _compiler(mode: str, model: Qwen2ForCausalLM, options: GraphOptions) -> Callable[..., Any]:
    """What turns a step into a compiled one."""
    if mode == "inductor":
        if options.cache_dir is not None:
            raise UnsupportedError(f"cache_dir={str(options.cache_dir)!r}: only torchair keeps graphs on disk")
        from qwen2_npu.graph import inductor

        return inductor.compiler(options)
    from qwen2_npu.graph import npu

    return npu.compiler(mode, model, options)
