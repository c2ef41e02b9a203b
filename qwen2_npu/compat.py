"""What differs between transformers 4.37.0 (the guide's) and 5.x. Nothing else asks for the version.

The two differences that reach users: 4.37.0's own model computes neither rope scaling nor sliding windows of a subset
of the layers, so with it there is no baseline for them and both are refused; and it returns logits in float32.
"""

from __future__ import annotations

import contextlib
import copy
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import Qwen2Config
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2 import modeling_qwen2

from qwen2_npu.errors import UnsupportedError


def served(version: str) -> bool:
    """Whether a transformers of this version has a ``generate`` that this model answers: 4.37, and 5.x.

    What lies between has neither the one's interface nor the other's.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) == (4, 37) or major == 5


def check_version(version: str) -> None:
    """Refuse the others.

    Raises:
        UnsupportedError: with the versions that are served.
    """
    if not served(version):
        raise UnsupportedError(
            f"transformers {version} is not served, 4.37.x and 5.x are: pip install transformers==5.24.0, or 4.37.0 "
            "to reproduce the upstream guide's rows"
        )


check_version(transformers.__version__)

VERSION: tuple[int, int] = tuple(int(part) for part in transformers.__version__.split(".")[:2])  # type: ignore[assignment]

IS_V4: bool = VERSION < (5, 0)

CACHE_NAME: str = "cache" if VERSION >= (5, 24) else "past_key_values"
"""What the installed version calls the KV cache: argument of ``forward`` and ``generate``, field of their outputs."""

LOGITS_IN_FLOAT32: bool = IS_V4
"""4.37.0's model upcasts the logits before it returns them; 5.x leaves that to ``generate``."""

WEIGHTS_FIELD = "transformers_weights"
"""Field of config.json in which 5.x finds the name of a file of weights, read in place of the usual ones."""

CONFIGURATIONS: dict[str, Any] = {"qwen2": Qwen2Config}
"""model_type -> class of the configurations that are served."""
if not IS_V4:
    CONFIGURATIONS["qwen2_moe"] = transformers.Qwen2MoeConfig

TIED_WEIGHTS: Any = ["lm_head.weight"] if IS_V4 else {"lm_head.weight": "model.embed_tokens.weight"}

STATIC_ROPE_TYPES: tuple[str, ...] = ("default", "linear", "yarn", "llama3")
"""Rope types whose frequencies do not depend on the sequence at hand, so that one table serves all."""


ACTIVATIONS: tuple[str, ...] = ("silu", "swish")
"""Names of one function."""

SLIDING = "sliding_attention"
"""The entry of ``layer_types`` for a layer that sees a window."""


# ---- config.json: one meaning, whichever version wrote it -----------------------------------------------------------
def _rope_of_4_37(values: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", values.get("rope_theta", DEFAULT_THETA))
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return {"rope_theta": theta} | ({"rope_scaling": rope} if scaled else {})


def _windows_of_4_37(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": SLIDING in values["layer_types"]}


def _dtype_of_4_37(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"torch_dtype": values["dtype"]}


DEFAULT_THETA = 10000.0
"""rope_theta in both versions, where a configuration has none."""

OF_4_37: dict[tuple[str, ...], Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    ("rope_parameters", "rope_scaling"): _rope_of_4_37,
    ("layer_types",): _windows_of_4_37,
    ("dtype",): _dtype_of_4_37,
}
"""Fields that 5.x reads and 4.37.0 does not, and what 4.37.0 reads in their place. (5.x reads all that 4.37.0 writes.)

Where both are given, the one counts that counts in 5.x. 4.37.0 has no rope scaling; ``rope_scaling`` is refused there.
"""


def in_words_of_4_37(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration as 4.37.0 names them."""
    found = dict(values)
    for names, translate in OF_4_37.items():
        if any(values.get(name) is not None for name in names):
            found = {name: value for name, value in found.items() if name not in names} | translate(values)
    return found


def in_own_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that either version may have written, as the installed one reads them."""
    return in_words_of_4_37(values) if IS_V4 else dict(values)


def settled(config: Qwen2Config) -> Qwen2Config:
    """A copy of ``config`` in which every setting is where the installed version looks for it.

    4.37.0's reader leaves what 5.x wrote aside. 5.x takes ``layer_types`` that are longer than the model, and a window
    with use_sliding_window=False; from a file it would refuse the one and ignore the other.
    """
    config = copy.deepcopy(config)
    fields = vars(config)
    own = in_own_words(fields)
    if own.get("layer_types") is not None:
        own["layer_types"] = own["layer_types"][: config.num_hidden_layers]
        own["use_sliding_window"] = own["use_sliding_window"] or SLIDING in own["layer_types"]
    fields.clear()
    fields.update(own)
    return config


def readable_by_both(config: Any) -> Any:
    """``config`` to be saved: what 5.x writes under names of its own is there under those of 4.37.0, too."""
    if IS_V4:
        return config
    values = config.to_dict()
    added = {name: value for name, value in in_words_of_4_37(values).items() if name not in values}
    config = copy.deepcopy(config)
    vars(config).update(added)  # torch_dtype and rope_scaling are properties of 5.x's class
    return config


# ---- what a configuration means -------------------------------------------------------------------------------------


def rope_frequencies(config: Qwen2Config) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (head_dim/2,) float32 and the factor on cos and sin, as the installed stock model has
    them.

    Raises:
        UnsupportedError: that model cannot compute them from the configuration's numbers.
    """
    try:
        return _rope_frequencies(config)
    except Exception as error:  # arithmetic with whatever stands there
        raise _no_frequencies(config, " ".join(str(error).split())) from error


def check_rope(config: Qwen2Config) -> None:
    """Refuse what no rotary frequencies can be computed from.

    Raises:
        UnsupportedError: see :func:`rope_frequencies`; or they are not finite, or not one for each pair of values.
    """
    inv_freq, scaling = rope_frequencies(config)
    if len(inv_freq) != head_dim(config) // 2:
        raise _no_frequencies(config, f"they are {len(inv_freq)}, for head_dim={head_dim(config)}")
    if not math.isfinite(scaling) or not bool(torch.isfinite(inv_freq).all()):
        raise _no_frequencies(config, "they are not finite")


def _no_frequencies(config: Qwen2Config, reason: str) -> UnsupportedError:
    name = "rope_theta" if IS_V4 else "rope_parameters"
    given = " ".join(str(getattr(config, name, None)).split())
    return UnsupportedError(
        f"{name}={given[:300]}: no rotary frequencies can be computed from it ({reason}); correct it in config.json"
    )


def _rope_frequencies(config: Qwen2Config) -> tuple[torch.Tensor, float]:
    if IS_V4:
        exponents = torch.arange(0, head_dim(config), 2, device="cpu").float() / head_dim(config)
        return 1.0 / (config.rope_theta**exponents), 1.0
    with torch.device("cpu"):
        rotary = modeling_qwen2.Qwen2RotaryEmbedding(config)
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


def head_dim(config: Qwen2Config) -> int:
    """Size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def expert_count(config: Any) -> int:
    """Experts of each layer that has them; 0 in a dense model, whatever else its configuration holds."""
    return config.num_experts if config.model_type == "qwen2_moe" else 0


def is_sparse(config: Any, layer: int) -> bool:
    """Whether the MLP of that layer is a mixture of experts."""
    if not expert_count(config) or layer in config.mlp_only_layers:
        return False
    return bool((layer + 1) % config.decoder_sparse_step == 0)


def kv_head_count(config: Qwen2Config) -> int:
    """Key/value heads; a config may leave them out where every query head has its own."""
    return config.num_key_value_heads or config.num_attention_heads


def sliding_windows(config: Qwen2Config) -> list[int | None]:
    """Per layer its sliding window in tokens, or None where the layer sees everything."""
    if IS_V4:
        return [None] * config.num_hidden_layers
    assert config.layer_types is not None, "check_config() comes first"
    kinds = config.layer_types[: config.num_hidden_layers]
    return [config.sliding_window if kind == SLIDING else None for kind in kinds]


def _check_experts(config: Any) -> None:
    """Refuse a mixture of experts that is not Qwen2's.

    Raises:
        UnsupportedError: more experts per token than there are, or what the published models do not have.
    """
    chosen, experts = config.num_experts_per_tok, config.num_experts
    if chosen > experts:
        raise UnsupportedError(
            f"num_experts_per_tok={chosen} of num_experts={experts}: a token goes to each expert at most once"
        )
    if not config.qkv_bias:
        raise UnsupportedError("qkv_bias=False: this model has the biases that all published Qwen2 models have")
    if config.output_router_logits:
        raise UnsupportedError(
            "output_router_logits=True: this model returns no router logits, and computes no auxiliary loss of them; "
            "set it to false"
        )


def check_config(config: Qwen2Config) -> None:
    """Refuse what the installed transformers gives no baseline for.

    Raises:
        UnsupportedError: rope scaling or sliding windows on 4.37.0, a rope type without fixed frequencies, rope
            parameters that are not complete, or a sliding layer without a window.
    """
    if config.hidden_act not in ACTIVATIONS:
        raise UnsupportedError(
            f"hidden_act={reprlib.repr(config.hidden_act)}: this model computes silu, which all Qwen2 and Qwen1.5 "
            "checkpoints use; use the stock model for others"
        )
    if expert_count(config):
        _check_experts(config)
    version = transformers.__version__
    if IS_V4:
        if getattr(config, "use_sliding_window", False):
            raise UnsupportedError(
                f"use_sliding_window=True: transformers {version}'s own Qwen2 applies the window to every "
                "layer, so there is no baseline to agree with; set use_sliding_window=False (and every entry of "
                "layer_types to 'full_attention') or install 'transformers>=5,<6'"
            )
        if getattr(config, "rope_scaling", None) is not None:
            raise UnsupportedError(
                f"rope_scaling={config.rope_scaling}: transformers {version}'s own Qwen2 ignores it, so there "
                "is no baseline to agree with; remove it, or rope_parameters, from config.json, or install "
                "'transformers>=5,<6'"
            )
        return
    if config.layer_types is None:
        raise UnsupportedError("layer_types=None: list 'full_attention' or 'sliding_attention' for each layer")
    if SLIDING in config.layer_types and not config.sliding_window:
        raise UnsupportedError(
            f"layer_types has {SLIDING!r}, and sliding_window={config.sliding_window} "
            f"(use_sliding_window={config.use_sliding_window}): "
            "set both, or make all layers 'full_attention'"
        )
    rope: Any = config.rope_parameters
    if not isinstance(rope, dict) or None in (rope.get("rope_type"), rope.get("rope_theta")):
        raise UnsupportedError(
            f"rope_parameters={reprlib.repr(rope)} must have rope_type and rope_theta (as rope_scaling=, given by "
            "keyword, it replaces all of them): {'rope_type': 'default', 'rope_theta': 1000000.0}"
        )
    rope_type = rope["rope_type"]
    if rope_type not in STATIC_ROPE_TYPES:
        raise UnsupportedError(
            f"rope_type={reprlib.repr(rope_type)} changes its frequencies with the sequence; supported are "
            f"{', '.join(STATIC_ROPE_TYPES)}"
        )


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The KV cache of a call that may name it either way.

    Raises:
        ValueError: both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("cache and past_key_values are two names of one argument: pass one of them")
    return past_key_values if cache is None else cache


def cache_of(output: Any) -> Any:
    """The KV cache in an output of ``forward`` or ``generate``, or None."""
    return getattr(output, CACHE_NAME, None)


def growing_cache() -> DynamicCache:
    """The stock growing cache, keeping every token of every layer (our masks cut the sliding windows)."""
    return DynamicCache()


def grows_whole(cache: Any) -> bool:
    """Whether ``cache`` is a stock growing one that keeps every token of every layer, as :func:`growing_cache` does."""
    plain = {"DynamicLayer"}
    return type(cache) is DynamicCache and plain.issuperset(
        type(layer).__name__ for layer in getattr(cache, "layers", ())
    )


def described(cache: Any) -> str:
    """A cache's kind for an error: its class, and that of its layers where they are not plain."""
    kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", None) or ()} - {"DynamicLayer"})
    return f"a {type(cache).__name__}{f' of {kinds[0]}' if kinds else ''}"


def cached_rows(cache: Any) -> int | None:
    """Rows in a growing cache; None of an empty one, and of any other kind."""
    if not isinstance(cache, DynamicCache):
        return None
    layers: Any = cache
    tensors = layers.key_cache if IS_V4 else [getattr(layer, "keys", None) for layer in layers.layers]
    return next((int(tensor.shape[0]) for tensor in tensors if isinstance(tensor, torch.Tensor)), None)


@contextlib.contextmanager
def unchanged_on_error(cache: Any) -> Iterator[None]:
    """Leave a growing cache as it was where the body raises: it replaces its tensors, and never writes into them."""
    if not isinstance(cache, DynamicCache):
        yield
        return
    before = _copied(vars(cache))
    layers = [_copied(vars(layer)) for layer in getattr(cache, "layers", [])]
    try:
        yield
    except BaseException:
        vars(cache).clear()
        vars(cache).update(before)
        for layer, state in zip(getattr(cache, "layers", []), layers, strict=True):
            vars(layer).clear()
            vars(layer).update(state)
        raise


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Lists are changed in place; all else is replaced."""
    return {name: list(value) if isinstance(value, list) else value for name, value in attributes.items()}


def torch_dtype_of(config: Qwen2Config) -> torch.dtype | None:
    """The dtype a checkpoint's config names, or None."""
    dtype = getattr(config, "torch_dtype" if IS_V4 else "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def named_weights(config: Any) -> str | None:
    """The file of weights that config.json names, or None. 4.37 knows no such field."""
    return None if IS_V4 else getattr(config, WEIGHTS_FIELD, None)


def set_torch_dtype(config: Any, dtype: torch.dtype) -> None:
    """Record the dtype of the weights in ``config``."""
    setattr(config, "torch_dtype" if IS_V4 else "dtype", dtype)
