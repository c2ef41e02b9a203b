"""The GE graph that torchair lowers one step of the model to, at any size, under fake tensors.

Nothing is computed and no weight is allocated: the real torchair front end (dynamo, AOT, FX passes, converters, graph
passes) runs on tensors that have only a shape, and what it would hand to the graph engine is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2_npu.compat import growing_cache, head_dim, is_sparse
from qwen2_npu.conformance.sizes import Size
from qwen2_npu.emulator.ge.proto import Node, parse
from qwen2_npu.graph import GraphOptions, npu
from qwen2_npu.graph.steps import DYNAMO, mark_static
from qwen2_npu.models.inputs import Rows, fixed_cache_step
from qwen2_npu.models.qwen2 import Qwen2ForCausalLM
from qwen2_npu.optimizations import Optimizations, Phase
from qwen2_npu.parallel.collectives import ALONE, Ranks
from qwen2_npu.parallel.sharding import Shard

if TYPE_CHECKING:
    from transformers import Qwen2Config


DEVICE = "npu:0"

HOST = 0
"""torchair's ``Placement.HOST``."""


@dataclass(frozen=True)
class Lowered:
    """One lowered step.

    Attributes:
        live: tokens a row attends to: the prompt's in prefill, the past and the new one in decode.
        nodes: the GE graph's nodes in its order.
        weights: index of every Data node that is a parameter.
        on_host: index of every Data node whose tensor is on the host (the live lengths).
        ranks: cards that share the model: the size of the groups of its collectives, which few GE operators state.
        unlike: layers that differ from the others: the last one of a prefill with ``last_layer``.
        sparse: how many of the layers are mixtures of experts.
    """

    phase: Phase
    batch: int
    live: int
    layers: int
    nodes: list[Node]
    weights: frozenset[int]
    on_host: frozenset[int]
    ranks: int = 1
    unlike: int = 0
    sparse: int = 0


class RawGraph(NamedTuple):
    """What torchair makes of one call: the ``GraphDef``, and per Data index whether it is a parameter."""

    proto: Any
    parameters: list[int]


class _Done(Exception):  # noqa: N818 - no error: ends the run once the graph is there
    pass


def lower(
    config: Qwen2Config,
    phase: Phase,
    batch: int,
    capacity: int,
    optimizations: Optimizations,
    *,
    prompt: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    frozen_parameter: bool = True,
    tp_size: int = 1,
) -> Lowered:
    """Lower one step of ``Qwen2ForCausalLM(config, optimizations)``.

    Args:
        capacity: slots of the KV cache.
        prompt: tokens of the prompt (prefill), or live tokens before the step (decode); default: half the capacity.
            Without the fixed cache every decode step is another graph; this is the one after so many tokens.
        tp_size: lower what the first of so many ranks computes.
    """
    prompt = capacity // 2 if prompt is None else prompt
    with fake_ranks(tp_size) as ranks, fake_model(config, optimizations, dtype, ranks) as model:
        if optimizations.fixed_kv_cache:
            step, arguments = step_arguments(model, phase, batch, capacity, prompt)
        else:
            step, arguments = growing_arguments(model, phase, batch, prompt)
        raw = lower_call(step, arguments, dynamic=optimizations.ifa_tiling, frozen_parameter=frozen_parameter)
    unlike = int(optimizations.last_layer and phase == "prefill")
    return describe(raw, config, phase, batch, prompt, ranks=tp_size, unlike=unlike)


def lower_size(
    size: Size,
    phase: Phase,
    batch: int,
    optimizations: Optimizations,
    *,
    prompt: int,
    capacity: int,
    layers: int | None = None,
) -> Lowered:
    """Lower one step of a documented size, or of one card of several, in bf16.

    Args:
        layers: fewer than the size has.
    """
    config = size.config(layers=layers, scheme=optimizations.scheme)
    return lower(config, phase, batch, capacity, optimizations, prompt=prompt, tp_size=size.shards)


def describe(
    raw: RawGraph, config: Qwen2Config, phase: Phase, batch: int, prompt: int, *, ranks: int = 1, unlike: int = 0
) -> Lowered:
    """``raw`` as the lowered step it is."""
    places = raw.proto.attr["_input_placements"].list.i
    return Lowered(
        phase=phase,
        batch=batch,
        live=prompt if phase == "prefill" else prompt + 1,
        layers=config.num_hidden_layers,
        nodes=parse(raw.proto),
        weights=frozenset(index for index, frozen in enumerate(raw.parameters) if frozen),
        on_host=frozenset(index for index, place in enumerate(places) if place == HOST),
        ranks=ranks,
        unlike=unlike,
        sparse=sum(is_sparse(config, layer) for layer in range(config.num_hidden_layers)),
    )


@contextmanager
def fake_ranks(count: int) -> Iterator[Ranks]:
    """The first of ``count`` ranks whose collectives send nothing: enough to be lowered.

    Raises:
        RuntimeError: there are real ranks in this process, which lowering would have to wait for.
    """
    if count == 1:
        yield ALONE
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a process that belongs to a process group cannot lower for others: use another process")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield Ranks(Shard(0, count), dist.group.WORLD, hcom="lowered")
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_model(
    config: Qwen2Config, optimizations: Optimizations, dtype: torch.dtype, ranks: Ranks = ALONE
) -> Iterator[Qwen2ForCausalLM]:
    """The model on a fake NPU, inside its fake tensor mode."""
    import torch_npu  # noqa: F401 - the device

    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            # Around the construction alone: dynamo would trace the Python of the default device at every operator.
            with torch.device(DEVICE):
                model = Qwen2ForCausalLM.of_kind(config)(config, optimizations, ranks).eval()
        finally:
            torch.set_default_dtype(before)
        model._prepare_rotary(torch.device(DEVICE), 1, None, None, padded=0)
        yield model


def step_arguments(
    model: Qwen2ForCausalLM, phase: Phase, batch: int, capacity: int, prompt: int
) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    """A step of ``model``, and what ``forward`` would call it with."""
    device = model.device
    cache: Any = model.allocate_cache(batch, capacity)
    tokens = prompt if phase == "prefill" else 1
    if phase == "decode":
        with cache.step([prompt] * batch, prompt):
            pass
    rows = Rows(None, [tokens] * batch)
    with fixed_cache_step(cache, rows, tokens, tokens, None, model._masks, device) as (_, inputs):
        pass
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    caches = list(zip(cache.key_cache, cache.value_cache, strict=True))
    if phase == "decode":
        return model.decode_step, (ids, inputs, caches)
    index = rows.find(slice(-1, None), tokens, device) if model.optimizations.last_token_logits else None
    return model.prefill_step, (ids, inputs, caches, index)


def growing_arguments(
    model: Qwen2ForCausalLM, phase: Phase, batch: int, prompt: int
) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    """A step over the stock growing cache, with ``prompt`` tokens in it in decode; logits of all positions."""
    cache, config = growing_cache(), cast("Qwen2Config", model.config)
    if phase == "decode":
        kv_heads = model.ranks.shard.count("kv heads", config)
        shape = (batch, kv_heads, prompt, head_dim(config))
        for layer in range(config.num_hidden_layers):
            past = torch.zeros(shape, dtype=model.dtype, device=model.device)
            cache.update(past, past.clone(), layer)
    ids = torch.zeros(batch, prompt if phase == "prefill" else 1, dtype=torch.int64, device=model.device)
    return model._forward_growing, (ids, None, None, cache, None, None)


def lower_call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    dynamic: bool,
    static: bool = True,
    frozen_parameter: bool = True,
) -> RawGraph:
    """What ``function(*arguments)`` is lowered to; it is not run.

    Args:
        static: mark every tensor argument static, as the compiled steps do.

    Raises:
        RuntimeError: the call was never lowered.
    """
    config = npu.compiler_config(
        GraphOptions(dynamic, frozen_parameter, tiling_schedule_optimize=dynamic, cache_dir=None)
    )
    graphs: list[RawGraph] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        _lower_with_torchair(module, inputs, config, graphs)

        def stop(*_: Any) -> Any:
            raise _Done

        return stop

    if static:
        mark_static(arguments)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)
    try:
        with torch.no_grad(), torch._dynamo.config.patch(DYNAMO):
            compiled(*arguments)
    except _Done:
        pass
    finally:
        torch._dynamo.reset()
    if len(graphs) != 1:
        raise RuntimeError(f"{function} was lowered to {len(graphs)} graphs, expected 1")
    return graphs[0]


def _lower_with_torchair(
    module: torch.fx.GraphModule, inputs: list[torch.Tensor], config: Any, graphs: list[RawGraph]
) -> None:
    """What torchair's backend does, keeping the graph it makes."""
    from torchair import npu_fx_compiler
    from torchair._ge_concrete_graph.graph_pass import get_frozen_flag

    compiler = npu_fx_compiler.get_compiler(config)

    def record(*arguments: Any) -> Any:
        compiled = compiler(*arguments)
        graphs.append(RawGraph(compiled.runner.graph._proto, get_frozen_flag(compiled.runner._input_info_list)))
        return compiled

    decompositions = npu_fx_compiler._get_merged_decompositions(config)
    npu_fx_compiler._compile_graph_with_aot(module, record, inputs, config, decompositions)
