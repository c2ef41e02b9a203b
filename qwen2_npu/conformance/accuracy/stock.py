"""The baseline (stock transformers Qwen2, eager attention) and its exact float64 self.

Differences between transformers 4.37 and 5.x that concern the stock model live here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any

from qwen2_npu.checkpoint.configuration import read_generation_config
from qwen2_npu.checkpoint.experts import one_by_one, stacked
from qwen2_npu.checkpoint.merged import MergedSource
from qwen2_npu.checkpoint.naming import as_stock
from qwen2_npu.checkpoint.sources import Source, StateDictSource, open_checkpoint, parse_dtype
from qwen2_npu.checkpoint.weights import check_source
from qwen2_npu.compat import expert_count, head_dim, settled
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.models.layers import TABLE_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Config

_MAJOR = int(transformers.__version__.split(".")[0])
HEAD_DIM_IS_FREE = _MAJOR >= 5
"""Whether the stock Qwen2 reads ``config.head_dim`` (4.37 takes hidden_size / num_attention_heads)."""

PIECE = 1 << 22
"""Values of a tensor that are looked at at once."""

_INITIALISATION = "transformers.initialization" if _MAJOR >= 5 else "transformers.modeling_utils"
"""Where ``no_init_weights`` is."""


def uninitialised(config: Qwen2Config, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The stock model on the CPU with parameters that hold anything: the caller fills them.

    Args:
        dtype: default: the default one. Rotary tables are made in float32 (``model.to`` would round them).
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype or previous)
    try:
        with torch.device("cpu"), import_module(_INITIALISATION).no_init_weights():
            model = stock_class(config)(config)
    finally:
        torch.set_default_dtype(previous)
    model.tie_weights()
    return model


def stock_class(config: Any) -> Any:
    """The stock model's class for a configuration."""
    return getattr(transformers, "Qwen2MoeForCausalLM" if expert_count(config) else "Qwen2ForCausalLM")


def stock_from_state_dict(
    config: Qwen2Config,
    state_dict: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The stock model with these weights, built as ``from_pretrained`` would: rotary tables are made in float32.

    (``model.to(bfloat16)`` would round the inverse frequencies, which no loaded model has.)
    """
    config = as_stock(
        StateDictSource(config, one_by_one(state_dict))
    ).config  # not tied where the state dict has both tensors
    model = uninitialised(with_eager_attention(config), dtype)
    missing, unexpected = model.load_state_dict(stacked(state_dict), strict=False)
    absent = [name for name in missing if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    if absent or unexpected:
        raise ValueError(f"state dict does not fit the stock Qwen2: missing {absent}, unexpected {list(unexpected)}")
    return model.eval().to(device)


def stock_from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    assume_tp: int | None = None,
) -> PreTrainedModel:
    """The stock model of a checkpoint folder, with eager attention. A merged one is unmerged in memory.

    Args:
        assume_tp: for how many ranks it was merged, where it was and does not record it.

    Raises:
        CheckpointError: what is wrong with the folder. (transformers would fill missing tensors with random values.)
    """
    source = open_checkpoint(path, assume_tp=assume_tp)
    check_source(source)
    if isinstance(source, MergedSource):
        unmerged: Any = stock_from_source(source, Path(path), parse_dtype(dtype) or source.stored_dtype())
        return cast("PreTrainedModel", unmerged.to(device))
    dtype_argument: dict[str, Any] = {"dtype" if _MAJOR >= 5 else "torch_dtype": dtype}
    model = stock_class(source.config).from_pretrained(
        str(path),
        config=with_eager_attention(source.config),  # its own reader may not know what another version wrote
        attn_implementation="eager",
        local_files_only=True,
        **dtype_argument,
    )
    return model.eval().to(device)


def stock_from_source(source: Source, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The stock model of a folder whose tensors ``source`` presents as stock ones, read one at a time."""
    model = uninitialised(with_eager_attention(source.config), dtype)
    parameters = one_by_one(dict(model.named_parameters(remove_duplicate=False)))
    with torch.no_grad():
        for name, tensor in source.tensors():
            if name in parameters:  # not so: rotary frequencies of old checkpoints
                parameters[name].copy_(tensor)
    generation_config = read_generation_config(folder, source.config.vocab_size)
    if generation_config is not None:
        model.generation_config = generation_config
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def reference_dtype(parameters: int, dtype: torch.dtype, available: int) -> torch.dtype:
    """float64 where that many parameters fit ``available`` bytes; else float32, which will do for 16-bit baselines.

    (Rounding in float32 is 2⁻¹⁶ of that in bfloat16 and 2⁻¹³ of that in float16: nothing beside a factor of 1.5.)

    Raises:
        MemoryError: neither serves, with the sizes and the way out.
    """
    if parameters * torch.float64.itemsize <= available:
        return torch.float64
    if dtype.itemsize == 2 and parameters * torch.float32.itemsize <= available:
        return torch.float32
    needed = parameters * (4 if dtype.itemsize == 2 else 8)
    raise MemoryError(
        f"the exact reference of {parameters / 1e9:.3g} billion parameters needs {needed / 2**30:.3g} GiB of host "
        f"memory, {available / 2**30:.3g} GiB are free; compare layer by layer (--stream), use a machine with more"
        + ("" if dtype.itemsize == 2 else ", or --dtype bfloat16, whose reference takes half")
    )


def exact_reference(
    model: PreTrainedModel, dtype: torch.dtype | None = None, exactly: Iterable[tuple[str, torch.Tensor]] = ()
) -> PreTrainedModel:
    """The stock model's exact self on the CPU: the same weights, upcast to ``dtype`` without rounding.

    Call it inside :func:`exact`; ``teacher.run_reference`` does. Rotary tables are recomputed in float64 from the
    float32 inverse frequencies: those are part of the model's definition, what is computed from them is not.

    Args:
        dtype: float64 or float32; None for what fits, see :func:`reference_dtype`.
        exactly: stock tensors that are meant as they are here, of which ``model`` has roundings.
    """
    if dtype is None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        dtype = reference_dtype(parameters, model.dtype, psutil.virtual_memory().available)
    reference = stock_from_state_dict(cast("Qwen2Config", model.config), model.state_dict(), dtype=dtype)
    named = one_by_one(dict(reference.named_parameters()))
    with torch.no_grad():
        for name, tensor in exactly:
            named[name].copy_(tensor)
    if dtype != torch.float64:
        return reference
    rotary: Any
    for rotary in reference.modules():
        if hasattr(rotary, "inv_freq"):
            rotary.inv_freq = rotary.inv_freq.double()
        if hasattr(rotary, "cos_cached"):  # 4.37 looks up tables that it made in float32
            positions = torch.arange(rotary.max_seq_len_cached, dtype=torch.float64)
            angles = torch.outer(positions, rotary.inv_freq).repeat(1, 2)
            rotary.cos_cached, rotary.sin_cached = angles.cos(), angles.sin()
    return reference


def check_finite(state: Mapping[str, torch.Tensor], where: str, dtype: torch.dtype | None = None) -> None:
    """Refuse weights that no comparison can be made with.

    Args:
        dtype: what they will be cast to; None for what they are in.

    Raises:
        CheckpointError: naming the first tensor with NaN or infinite values, how many, and the way out.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        # In pieces, none of which needs much memory for its mask.
        nans = infinities = 0
        for piece in tensor.split(max(1, PIECE // max(1, tensor[:1].numel()))):
            cast = piece.to(dtype or tensor.dtype)
            if not bool(torch.isfinite(cast).all()):
                nans, infinities = nans + int(cast.isnan().sum()), infinities + int(cast.isinf().sum())
        if nans or infinities:
            raise CheckpointError(
                f"{where}: tensor {name} has {nans} NaN and {infinities} infinite of {tensor.numel()} values in "
                f"{dtype or tensor.dtype}; fetch the checkpoint again, or use a wider dtype if only the cast overflows"
            )


class _KeepFloat64(TorchFunctionMode):
    """Casts of float64 tensors to float32, and reductions asked to run in float32, stay in float64.

    The stock model casts to float32 inside its norms, its softmax and its rotary embedding, whatever its own dtype.
    Left alone, "the model in float64" would carry float32 noise: as much as the float32 baseline it is to judge.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if tree_any(lambda leaf: isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64, args):
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def exact(reference: PreTrainedModel) -> Iterator[None]:
    """Within it, a float64 ``reference`` computes in float64 throughout. A float32 one needs nothing."""
    if reference.dtype != torch.float64:
        yield
        return
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # 4.37 fills its mask with finfo(float64).min in the default dtype
    try:
        with _KeepFloat64():
            yield
    finally:
        torch.set_default_dtype(previous)


def with_eager_attention(config: Qwen2Config) -> Qwen2Config:
    """A copy of ``config`` for the stock model, with eager attention: it means there what it means here.

    Raises:
        UnsupportedError: transformers 4.37's model has no such heads.
    """
    config = type(config).from_dict(settled(config).to_dict())
    config._attn_implementation = "eager"
    if expert_count(config):
        config._experts_implementation = "eager"  # one expert after the other
    if HEAD_DIM_IS_FREE:
        return config
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedError(
            f"head_dim={head_dim(config)}: transformers {transformers.__version__}'s own Qwen2 has hidden_size / "
            f"num_attention_heads = {config.hidden_size} / {config.num_attention_heads}, so there is no baseline to "
            "compare with; install 'transformers>=5,<6'"
        )
    if not config.use_sliding_window:
        config.sliding_window = None  # 4.37's eager attention is masked by it, whatever use_sliding_window says
    # 4.37 builds a table of all positions in every layer. It makes a longer one where it needs that.
    config.max_position_embeddings = min(config.max_position_embeddings, TABLE_ROWS)
    return config
