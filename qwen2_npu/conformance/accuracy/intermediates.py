"""Named intermediate tensors of one forward pass, in the same form from the stock model and from this project's.

Two instruments, neither of which the models know of: forward hooks on modules (their names are the stock ones in
both), and a mode that sees calls of functions: ``torch.ops.npu.*`` in the optimised model, ``torch.matmul`` in eager
attention. The second tells what attention reads, i.e. query after rotation, keys and values after the cache, and
which operators ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qwen2_npu.conformance.accuracy.expert_points import expert_hooks
from qwen2_npu.conformance.accuracy.noise import Array
from qwen2_npu.models.quantized import Activations, QuantizedRows
from qwen2_npu.parallel.sharding import Shard, Unit

ATTENTION_OPERATORS = ("npu_prompt_flash_attention", "npu_incre_flash_attention", "npu_fused_infer_attention_score")
ROTARY_OPERATORS = ("npu_apply_rotary_pos_emb", "npu_rotary_mul")
CACHE_OPERATORS = ("scatter_update_", "scatter_update", "npu_scatter_pa_kv_cache")

IN_INT8 = " in int8"
"""What the name of a point has after it where it is what 8 bits keep of a product's input."""

CUT_POINTS: dict[str, Unit] = {
    **dict.fromkeys(("q_proj", "query", "attention"), "query heads"),
    **dict.fromkeys(("k_proj", "v_proj", "key", "value"), "kv heads"),
    **dict.fromkeys(("gate_proj", "up_proj", "mlp activation", f"mlp activation{IN_INT8}"), "columns"),
    **dict.fromkeys(("shared gate_proj", "shared up_proj", "shared mlp activation"), "shared columns"),
    "lm_head": "vocabulary",
}
"""Points of which every rank of a shared model computes a part; the others are whole on each."""

ATTENTION_READS = ("query", "key", "value")

SUMMED_POINTS = ("o_proj", "down_proj", "combination")
"""Points that are sums over the ranks."""

PARTIAL_POINTS = ("expert products", "shared down_proj")
"""Points of which every rank has a part of the sum: the model adds up their combination alone."""


def npu_operator(func: Any) -> str | None:
    """The name of a ``torch.ops.npu`` operator, without its overload; None for any other function."""
    qualified = getattr(func, "_qualified_op_name", None) or str(getattr(func, "name", lambda: "")() or "")
    if not qualified.startswith("npu::"):
        return None
    return qualified.removeprefix("npu::").split(".")[0]


@dataclass(frozen=True)
class Point:
    """One tensor. ``values`` (tokens, features): valid tokens only, row after row. ``operators``: the npu operators
    that ran between the previous point and this one; empty where small operators did the work. ``heads``: of what
    attention reads, the equal parts of the features."""

    layer: int | None
    name: str
    values: Array
    operators: tuple[str, ...] = ()
    heads: int = 1

    @property
    def where(self) -> str:
        return self.name if self.layer is None else f"layer {self.layer}, {self.name}"


@dataclass
class PassRecorder:
    """Points of one forward pass in order of execution.

    Args:
        new: tokens per row that this pass feeds.
        total: tokens per row that attention can see.
        left: whether rows are compacted to the left inside the model (fixed cache) or padded on the left.
    """

    new: list[int]
    total: list[int]
    left: bool
    points: list[Point] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)

    def add(self, layer: int | None, name: str, tensor: torch.Tensor, lengths: list[int] | None = None) -> None:
        """``tensor``: (B, S, …) or, for one token per row, (B, features); of a mixture (B·S, features)."""
        lengths = self.new if lengths is None else lengths
        if tensor.dim() == 2:
            tensor = tensor.unflatten(0, (len(lengths), -1))
        width = tensor.shape[1]
        spans = [slice(0, n) if self.left else slice(width - n, width) for n in lengths]
        rows = [tensor[row, span].reshape(n, -1) for row, (span, n) in enumerate(zip(spans, lengths, strict=True))]
        heads = tensor.shape[2] if tensor.dim() == 4 else 1
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        values = torch.cat(rows).detach().to("cpu", dtype).numpy().copy()
        self.points.append(Point(layer, name, values, tuple(dict.fromkeys(self.pending)), heads))
        self.pending.clear()

    def add_input(self, layer: int | None, name: str, input: Activations) -> None:
        """The input of a product, which 8-bit activations may be."""
        if isinstance(input, QuantizedRows):
            self.add(layer, name + IN_INT8, input.values.float() * input.scale.unsqueeze(-1))
        else:
            self.add(layer, name, input)

    def by_place(self) -> dict[tuple[int | None, str], Point]:
        return {(point.layer, point.name): point for point in self.points}


def of_all_ranks(point: Point, model: Any) -> Point:
    """The whole of which ``point`` is one rank's part. All ranks of ``model`` must ask, for the same points."""
    unit, size = CUT_POINTS.get(point.name), model.ranks.size
    if point.name in SUMMED_POINTS and not point.operators:
        small = "mul, add" if point.name == "combination" else "linear"
        return replace(point, operators=(small, "all-reduce"))
    if point.name in PARTIAL_POINTS:
        total = model.ranks.all_reduce(torch.from_numpy(point.values).to(model.device))
        return replace(point, values=total.cpu().numpy())
    if unit is None:
        return point
    parts = [Shard(rank, size).part(unit, model.config) for rank in range(size)]
    # Ranks that share a kv head, or a vocabulary that is not cut, hold the same.
    kept = [rank for rank, part in enumerate(parts) if rank == 0 or part != parts[rank - 1]]
    if len(kept) == 1 and unit == "vocabulary":
        return point
    gathered = model.ranks.all_gather(torch.from_numpy(point.values).to(model.device)).cpu().numpy()
    tokens = len(gathered)
    values = gathered.reshape(tokens, size, -1)[:, kept].reshape(tokens, -1)
    return replace(point, values=values, heads=point.heads * len(kept) if point.name in ATTENTION_READS else 1)


@contextmanager
def capturing(model: Any, *, new: list[int], total: list[int], first_layer: int = 0) -> Iterator[PassRecorder]:
    """Capture the forward passes run inside: meant for one, uncompiled.

    Args:
        first_layer: the number of the model's first layer, where the model is a part of a larger one.
    """
    optimizations = getattr(model, "optimizations", None)
    capture = PassRecorder(new=new, total=total, left=bool(optimizations and optimizations.fixed_kv_cache))
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    watch = _Watch(capture, groups)
    handles = list(_hooks(model, capture, watch, first_layer))
    try:
        with watch:
            yield capture
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Takes down operators by name, and the arguments of the attention computation."""

    def __init__(self, capture: PassRecorder, groups: int) -> None:
        super().__init__()
        self.capture = capture
        self.groups = groups
        self.layer: int | None = None
        """The layer whose attention is running, between its projections and its o_proj."""
        self.products = 0
        self.mlp_layer: int | None = None
        """The layer whose MLP ran last."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = npu_operator(func)
        if name in ATTENTION_OPERATORS:
            layout = kwargs.get("input_layout", "BSH")
            query, key, value = (_to_bsnd(tensor, layout) for tensor in args[:3])
            self._read(query, key, value)
        elif func is torch.matmul and self.layer is not None and args[0].dim() == 4:
            self.products += 1
            if self.products == 1:
                query, key = args[0].transpose(1, 2), args[1].permute(0, 3, 1, 2)[:, :, :: self.groups]
                self._read(query, key, None)
            elif self.products == 2:
                self._read(None, None, args[1].transpose(1, 2)[:, :, :: self.groups])
        elif name == "npu_dequant_swiglu_quant":
            self._read_gate_and_up(*args, **kwargs)
        if name is not None:
            self.capture.pending.append(name)
        return func(*args, **kwargs)

    def enter_mlp(self, layer: int, *_: Any) -> None:
        self.mlp_layer = layer

    def _read_gate_and_up(
        self, sums: torch.Tensor, *, weight_scale: torch.Tensor, activation_scale: torch.Tensor, **others: Any
    ) -> None:
        """The product of integers that becomes them inside of the operator; gate is on the left."""
        both = sums.float() * weight_scale.reshape(1, -1) * activation_scale.reshape(-1, 1)
        for name, half in zip(("gate_proj", "up_proj"), both.chunk(2, dim=-1), strict=True):
            ran = list(self.capture.pending)
            self.capture.add(self.mlp_layer, name, half)
            self.capture.pending[:] = ran if name == "gate_proj" else []

    def _read(self, query: torch.Tensor | None, key: torch.Tensor | None, value: torch.Tensor | None) -> None:
        """(B, S, heads, D) each. The operators that ran so far are told apart by what they make."""
        ran = list(self.capture.pending)
        # One call is one over the heads of q, k and v.
        of_value = ("npu_rotary_mul",) if ran.count("npu_rotary_mul") == 1 else ()
        for name, tensor, makers in (
            ("query", query, ROTARY_OPERATORS),
            ("key", key, ROTARY_OPERATORS + CACHE_OPERATORS),
            ("value", value, of_value + CACHE_OPERATORS),
        ):
            if tensor is None:
                continue
            self.capture.pending[:] = [operator for operator in ran if operator in makers]
            self.capture.add(self.layer, name, tensor, None if name == "query" else self.capture.total)
        self.capture.pending.clear()


def _to_bsnd(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    return tensor.transpose(1, 2) if layout == "BNSD" else tensor


def _hooks(model: Any, capture: PassRecorder, watch: _Watch, first_layer: int) -> Iterator[Any]:
    """Registers the hooks; yields their handles."""
    for index, layer in enumerate(model.model.layers, first_layer):
        attention, mlp = layer.self_attn, layer.mlp
        yield from _norm(layer.input_layernorm, index, "input_layernorm", capture, _first(attention, "q", "qkv"))
        yield from _projections(attention, index, capture, watch)
        yield from _output_projection(attention.o_proj, index, capture, watch)
        yield mlp.register_forward_pre_hook(partial(watch.enter_mlp, index))
        after_norm = _first(mlp, "gate", "gate_up")
        yield from _norm(layer.post_attention_layernorm, index, "post_attention_layernorm", capture, after_norm)
        if hasattr(mlp, "experts"):
            yield from expert_hooks(mlp, index, capture, _mlp)
        else:
            yield from _mlp(mlp, index, capture)
    yield from _norm(model.model.norm, None, "norm", capture)
    yield _on_output(model.lm_head, capture, None, ("lm_head",))


def _mlp(mlp: Any, layer: int, capture: PassRecorder, prefix: str = "") -> Iterator[Any]:
    if hasattr(mlp, "gate_up_proj"):
        yield _on_output(mlp.gate_up_proj, capture, layer, (f"{prefix}gate_proj", f"{prefix}up_proj"))
    else:
        yield _on_output(mlp.gate_proj, capture, layer, (f"{prefix}gate_proj",))
        yield _on_output(mlp.up_proj, capture, layer, (f"{prefix}up_proj",))
    yield from _on_input(mlp.down_proj, capture, layer, f"{prefix}mlp activation")
    yield _on_output(mlp.down_proj, capture, layer, (f"{prefix}down_proj",))


def _norm(module: Any, layer: int | None, name: str, capture: PassRecorder, next_product: Any = None) -> Iterator[Any]:
    def hook(module: Any, args: Any, output: Any) -> None:
        # Ours returns (normed, sum); the stock norm is given the sum.
        normed, total = output if isinstance(output, tuple) else (output, args[0])
        ran = list(capture.pending)
        capture.add(layer, f"residual into {name}", total)
        capture.pending[:] = ran
        capture.add_input(layer, name, normed)

    yield module.register_forward_hook(hook)
    if next_product is not None:
        yield from _on_input(next_product, capture, layer, name, again=False)


def _projections(attention: Any, layer: int, capture: PassRecorder, watch: _Watch) -> Iterator[Any]:
    if hasattr(attention, "qkv_proj"):
        yield _on_output(attention.qkv_proj, capture, layer, ("q_proj", "k_proj", "v_proj"), attention.widths)
    else:
        for name in ("q_proj", "k_proj", "v_proj"):
            yield _on_output(getattr(attention, name), capture, layer, (name,))

    def enter(module: Any, *_: Any) -> None:
        watch.layer, watch.products = layer, 0

    yield attention.register_forward_pre_hook(enter)


def _output_projection(module: Any, layer: int, capture: PassRecorder, watch: _Watch) -> Iterator[Any]:
    def before(module: Any, args: Any) -> None:
        watch.layer = None

    yield module.register_forward_pre_hook(before, prepend=True)
    yield from _on_input(module, capture, layer, "attention")
    yield _on_output(module, capture, layer, ("o_proj",))


def _on_output(
    module: Any, capture: PassRecorder, layer: int | None, names: tuple[str, ...], widths: list[int] | None = None
) -> Any:
    """Takes down a linear's output, split into its named parts."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        sizes = widths or [output.shape[-1] // len(names)] * len(names)
        for name, part in zip(names, output.split(sizes, dim=-1), strict=True):
            capture.add(layer, name, part)

    return module.register_forward_hook(hook)


def _first(module: Any, *names: str) -> Any:
    """The one of its products that there is; None where it has other ones."""
    return next((getattr(module, f"{name}_proj") for name in names if hasattr(module, f"{name}_proj")), None)


def _on_input(module: Any, capture: PassRecorder, layer: int | None, name: str, again: bool = True) -> Iterator[Any]:
    """Takes down a linear's input; and what the stock model, where its inputs are rounded to 8 bits, makes of it.

    Args:
        again: also before it is rounded.
    """
    given: list[Any] = []

    def before(module: Any, args: Any) -> None:
        given[:] = args[:1]
        if again:
            capture.add_input(layer, name, args[0])

    def after(module: Any, args: Any) -> None:
        if args[0] is not given.pop():  # what stands between the two hooks has rounded it
            capture.add(layer, name + IN_INT8, args[0])

    yield module.register_forward_pre_hook(before, prepend=True)
    yield module.register_forward_pre_hook(after)
