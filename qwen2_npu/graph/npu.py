"""Modes ``torchair`` (GE graph) and ``npugraph_ex`` (ACL graph, experimental): Ascend NPUs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FunctionType, MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.utils import _pytree

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.graph.layout_copies import drop_layout_copies
from qwen2_npu.graph.steps import Step
from qwen2_npu.parallel.collectives import ALONE, Ranks

if TYPE_CHECKING:
    from qwen2_npu.graph import GraphOptions
    from qwen2_npu.models.qwen2 import Qwen2ForCausalLM


_OF_MODEL = re.compile(r"\bself\b")
"""In the names of guards on the model and on what is in it: ``self._modules['norm'].eps``, ``type(self.ranks)``."""


def check_installed(mode: str, others: Sequence[str]) -> None:
    """Refuse a mode whose compiler is not installed.

    Args:
        others: modes that the device takes, for the message.

    Raises:
        UnsupportedError: no torch_npu, or no torchair in it.
    """
    if importlib.util.find_spec("torch_npu") is None:
        release = torch.__version__.split("+")[0]
        raise UnsupportedError(
            f"mode={mode!r} needs torch_npu, which is missing: pip install torch_npu=={release}, or take "
            f"one of {', '.join(others)}"
        )
    if importlib.util.find_spec("torchair") is None and importlib.util.find_spec("torch_npu.dynamo.torchair") is None:
        raise UnsupportedError(
            f"mode={mode!r} needs torchair, which this torch_npu does not have; install a full build of it, or take "
            "eager"
        )


def compiler(mode: str, model: Qwen2ForCausalLM, options: GraphOptions) -> Callable[[Step], Step]:
    """Compiles a step for ``mode``."""
    if mode == "npugraph_ex":
        if options.cache_dir is not None:
            raise UnsupportedError(f"cache_dir={str(options.cache_dir)!r}: only mode='torchair' keeps graphs on disk")
        _let_torchair_register_first()
        _let_npugraph_ex_take_8_bit_weights()
        return lambda step: torch.compile(
            _with_own_code(step),
            backend="npugraph_ex",
            dynamic=options.dynamic,
            fullgraph=True,
            options={"guard_filter_fn": keep_input_guards},
        )
    config = compiler_config(options, model.ranks)
    if options.cache_dir is not None:
        folder = options.cache_dir / fingerprint(model)
        return lambda step: CachedStep(step, config, options.dynamic, folder)
    import torchair

    # One backend for both steps: another one, even with an equal configuration, compiles everything again.
    backend = torchair.get_npu_backend(compiler_config=config)
    # Weights stay where they are: the model holds them as long as its compiled steps. After torchair's own filters.
    warnings.filterwarnings("ignore", message="When enable frozen_parameter", category=UserWarning)
    return lambda step: torch.compile(
        _with_own_code(step),
        backend=backend,
        dynamic=options.dynamic,
        fullgraph=True,
        options={"guard_filter_fn": keep_input_guards},
    )


def _let_torchair_register_first() -> None:
    """npugraph_ex and torchair register the same rules with PyTorch. npugraph_ex sees that they are there; torchair
    does not, and every torchair graph of a process that began with npugraph_ex would fail."""
    import torch_npu  # noqa: F401 - puts torchair on the path
    import torchair

    torchair.get_npu_backend()


def _let_npugraph_ex_take_8_bit_weights() -> None:
    """Where npugraph_ex meets npu_weight_quant_batchmatmul it switches off an optimisation of torchair's, which it does
    not have, in settings that it does not have either, and fails."""
    from npugraph_ex.configs.compiler_config import CompilerConfig

    if not hasattr(CompilerConfig, "experimental_config"):
        CompilerConfig.experimental_config = SimpleNamespace()


def compiler_config(options: GraphOptions, ranks: Ranks = ALONE) -> Any:
    """torchair's ``CompilerConfig`` for ``options``."""
    import torch_npu  # noqa: F401 - puts torchair on the path
    from torchair.configs.compiler_config import CompilerConfig

    config = CompilerConfig()
    config.experimental_config.frozen_parameter = options.frozen_parameter
    config.experimental_config.tiling_schedule_optimize = options.tiling_schedule_optimize
    if ranks.size > 1:
        # Ranks that run their collectives in different orders wait for each other for ever. Here each one needs the
        # result of the one before; this order of GE's does not depend on it.
        config.experimental_config.topology_sorting_strategy = "StableRDFS"
    config.post_grad_custom_post_pass = drop_layout_copies
    return config


def keep_input_guards(guards: Sequence[Any]) -> list[bool]:
    """Guards as few as possible: on the inputs and their shapes, not on the hundreds of attributes of the model.

    The model does not change under a compiled step: ``compile_model`` makes new ones where it is called again, and
    those of another model have other code (:func:`_with_own_code`). Only its rotary table may grow.
    """
    return [
        guard.guard_type == "SHAPE_ENV"
        or guard.name.endswith(("._buffers['cos']", "._buffers['sin']"))
        or not (guard.is_global or _OF_MODEL.search(guard.name))
        for guard in guards
    ]


def fingerprint(model: Qwen2ForCausalLM) -> str:
    """Names what a compiled graph depends on beside its inputs' shapes: the model, the sources, the versions."""
    import torch_npu

    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    folders = [package / name for name in ("models", "graph", "parallel", "ops")]
    for source in sorted([*package.glob("*.py"), *(source for folder in folders for source in folder.rglob("*.py"))]):
        digest.update(source.read_bytes())
    described = {
        "config": model.config.to_dict(),
        "optimizations": model.optimizations.names(),
        "dtype": str(model.dtype),
        "shard": asdict(model.ranks.shard),
        "versions": [torch.__version__, torch_npu.__version__, transformers.__version__],
    }
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:20]


class CachedStep:
    """A step whose compiled graphs are kept on disk, by ``torchair.inference.cache_compile``.

    torchair keeps exactly one graph per callable and skips all guards when it reads one back, so every shape gets a
    callable and a folder of its own.
    """

    def __init__(self, step: Any, config: Any, dynamic: bool, folder: Path) -> None:
        self.step, self.config, self.dynamic, self.folder = step, config, dynamic, folder
        self.graphs: dict[str, Step] = {}

    def __call__(self, *arguments: Any) -> torch.Tensor:
        name = shape_name((arguments, self.step.__self__.model.rotary.cos))
        if name not in self.graphs:
            from torchair.inference import cache_compile

            # Readable by others, a folder of code is an invitation.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            own, folder = _with_own_code(self.step, f"_{name}"), str(self.folder / name)
            self.graphs[name] = cache_compile(own, config=self.config, dynamic=self.dynamic, cache_dir=folder)
        return self.graphs[name](*arguments)


def _with_own_code(step: Any, suffix: str = "") -> Any:
    """The method ``step`` with a code object of its own, whose name ends in ``suffix``.

    Dynamo keeps graphs with the code, which all models share; and without guards on the model, one model would run the
    graphs of another, with its constants. torchair takes a code that is compiled twice for a failure.
    """
    function = getattr(step, "__func__", step)
    code = function.__code__.replace(co_name=f"{function.__name__}{suffix}")
    own = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return own if function is step else MethodType(own, step.__self__)


def shape_name(arguments: Any) -> str:
    """A folder name that is equal for equal shapes, dtypes and structure."""
    leaves, structure = _pytree.tree_flatten(arguments)
    described = [
        f"{tuple(leaf.shape)}{tuple(leaf.stride())}{leaf.dtype}{leaf.device}"
        if isinstance(leaf, torch.Tensor)
        else type(leaf).__name__
        for leaf in leaves
    ]
    return hashlib.sha256(f"{structure}{described}".encode()).hexdigest()[:20]
