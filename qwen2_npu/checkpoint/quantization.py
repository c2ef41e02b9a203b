"""``quantization_config`` of config.json: which weights are 8-bit integers, and how they lie in the files.

The format is that of compressed-tensors, which llm-compressor writes and vLLM reads. Two of its schemes are served,
both with one scale per output channel and no zero point: ``w8a16`` (activations stay as they are) and ``w8a8``
(activations are quantised per token while the model runs). The tables here say so; all else is refused by name.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwen2_npu.compat import expert_count
from qwen2_npu.errors import CheckpointError

FIELD = "quantization_config"
METHOD = "compressed-tensors"
PACKED, PLAIN, NAIVE = "pack-quantized", "int-quantized", "naive-quantized"
FORMATS = {"w8a16": PACKED, "w8a8": PLAIN}
"""Scheme -> the format that it is written in. Either is read in any of the three."""

PATTERN = "re:"
"""What targets and ignored names begin with that are patterns."""

WAY_OUT = "use the checkpoint in bf16, fp16 or fp32, or quantise that with `qwen2-npu quantize`"

PRODUCT = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(experts\.\d+\.|shared_expert\.)?(gate|up|down)_proj)"
)
"""Stock modules that may be quantised."""

TOGETHER = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""Modules of a layer that are one product where they are fused: all of them are quantised, or none."""

LINEAR = "Linear"
"""The class of all of them, as a target."""


class Served(NamedTuple):
    """What a field may hold.

    Attributes:
        values: those values.
        default: the value of a field that is absent.
        text: what is served, to complete "…: only".
    """

    values: tuple[Any, ...]
    default: Any
    text: str


EIGHT_BITS = "integers of 8 bits are"
NO_ZERO_POINT = Served((True,), True, "symmetric integers, which have no zero point, are")
_KV_CACHE = Served((None,), None, "a KV cache that is not quantised is")
_SPARSITY = Served((None, {}), None, "dense weights are")

WHOLE: dict[str, Served] = {
    "format": Served((PACKED, PLAIN, NAIVE), None, f"{PACKED}, {PLAIN} and {NAIVE} are"),
    "quantization_status": Served(("compressed",), None, "'compressed' weights, as llm-compressor saves them, are"),
    "kv_cache_scheme": _KV_CACHE,
    "sparsity_config": _SPARSITY,
    "moe_sparsity_config": _SPARSITY,
    "transform_config": Served((None, {}), None, "weights without transforms are"),
}
"""Fields of all of it, beside those that are read one by one."""

GROUP: dict[str, Served] = {
    "output_activations": Served((None,), None, "outputs that are not quantised are"),
    "format": Served((None, PACKED, PLAIN, NAIVE), None, f"{PACKED}, {PLAIN} and {NAIVE} are"),
}
"""Fields of a group of modules, beside its targets and the two of :data:`ARGUMENTS`."""

_BOTH: dict[str, Served] = {
    "num_bits": Served((8,), 8, EIGHT_BITS),
    "type": Served(("int",), "int", EIGHT_BITS),
    "symmetric": NO_ZERO_POINT,
    "block_structure": Served((None,), None, "one scale per output channel is"),
}

ARGUMENTS: dict[str, dict[str, Served]] = {
    "weights": _BOTH
    | {
        "group_size": Served((None, -1), None, "one scale per output channel is, not one per group of inputs"),
        "strategy": Served(("channel",), "tensor", "strategy 'channel', one scale per output channel, is"),
        "dynamic": Served((False,), False, "weights with scales of their own are"),
        # "weight" is an order in which GPTQ goes through the columns; it leaves no trace in the weights.
        "actorder": Served((None, False, "weight", "static"), None, "columns in their own order are"),
    },
    "input_activations": _BOTH
    | {
        "group_size": Served((None,), None, "one scale per token is, not one per group of inputs"),
        "strategy": Served(("token",), "tensor", "strategy 'token', one scale per token, is"),
        "dynamic": Served((True,), False, "activations that are quantised while the model runs (dynamic=true) are"),
        "actorder": Served((None, False), None, "columns in their own order are"),
    },
}
"""Fields of what is said about weights, and about the activations that they are multiplied with."""

WITHOUT_EFFECT = ("version", "global_compression_ratio", "run_compressed", "dequantize", "use_optimized_inference")
HOW_FOUND = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
"""Fields of all of it, and of :data:`ARGUMENTS`, that may have any value: what transformers does with the weights, and
how the scales were found."""


@dataclass(frozen=True)
class Quantization:
    """What is quantised, and how.

    Attributes:
        scheme: "w8a16" or "w8a8".
        format: how the weights lie in the files, see :data:`FORMATS`.
        targets, ignored: names of modules, patterns, or the class of all linear layers.
    """

    scheme: str
    format: str
    targets: tuple[str, ...] = (LINEAR,)
    ignored: tuple[str, ...] = ("lm_head",)

    def covers(self, module: str) -> bool:
        """Whether the stock module of that name is quantised."""
        if PRODUCT.fullmatch(module) is None:
            return False
        return _names(self.targets, module) and not _names(self.ignored, module)

    @property
    def packed(self) -> bool:
        """Whether four integers are in one int32."""
        return self.format == PACKED


def _names(names: Iterable[str], module: str) -> bool:
    """As compressed-tensors: a pattern is for the beginning of a name, all else for a whole one or for the class."""
    return any(
        re.match(name.removeprefix(PATTERN), module) if name.startswith(PATTERN) else name in (module, LINEAR)
        for name in names
    )


def quantization_of(config: Any) -> Quantization | None:
    """What ``config.quantization_config`` says; None where there is none.

    Args:
        config: of transformers.

    Raises:
        CheckpointError: another scheme than the two that are served, or none; or modules that are one product here are
            not quantised alike.
    """
    found = parse(getattr(config, FIELD, None))
    if found is not None:
        _check_modules(found, config)
    return found


def parse(said: Any) -> Quantization | None:
    """The same, of the value of that field alone.

    Raises:
        CheckpointError: another scheme than the two that are served, or none.
    """
    if not said:
        return None
    to_dict = getattr(said, "to_dict", None)
    values: Any = to_dict() if callable(to_dict) else said
    method = values.get("quant_method") if isinstance(values, Mapping) else values
    if method != METHOD:
        raise CheckpointError(f"{FIELD} describes weights quantised with {reprlib.repr(method)}; {WAY_OUT}")
    if (sparsity := values.get("sparsity_config")) and isinstance(sparsity, Mapping):
        values = {**values, "sparsity_config": None} if sparsity.get("format") == "dense" else values
    _check(values, WHOLE, "", known=("quant_method", "config_groups", "ignore", *WITHOUT_EFFECT))
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _not_valid("config_groups", groups, "an object with one group of modules")
    parts = [_group(group, f"config_groups.{name}") for name, group in groups.items()]
    if len({part[:2] for part in parts}) > 1:
        raise CheckpointError(
            f"{FIELD}: config_groups has {len(groups)} groups with different settings ({', '.join(groups)}), and a "
            f"model has one scheme here; {WAY_OUT}"
        )
    scheme, form, _ = parts[0]
    if form not in (None, values["format"]):
        raise CheckpointError(
            f"{FIELD}: format={values['format']!r}, and that of its group of modules is {form!r}: one checkpoint has "
            f"one format here; {WAY_OUT}"
        )
    targets = tuple(target for part in parts for target in part[2])
    return Quantization(scheme, values["format"], targets, _listed(values.get("ignore") or [], "ignore"))


def _group(group: Any, where: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Scheme, format and targets of a group."""
    if not isinstance(group, Mapping):
        raise _not_valid(where, group, "an object with targets and weights")
    _check(group, GROUP, where, known=("targets", *ARGUMENTS))
    for name, table in ARGUMENTS.items():
        arguments = group.get(name)
        if arguments is None and name == "input_activations":
            continue
        if not isinstance(arguments, Mapping):
            raise _not_valid(f"{where}.{name}", arguments, "an object")
        channels = arguments.get("strategy") is None and arguments.get("group_size") == -1
        completed = {**arguments, "strategy": "channel"} if channels else arguments
        _check(completed, table, f"{where}.{name}", known=HOW_FOUND)
    scheme = "w8a16" if group.get("input_activations") is None else "w8a8"
    return scheme, group.get("format"), _listed(group.get("targets"), f"{where}.targets")


def _check(values: Mapping[str, Any], table: Mapping[str, Served], where: str, known: tuple[str, ...]) -> None:
    """Refuse what the table does not take, and every field that is not known unless it is empty."""
    scope = f"{where}." if where else ""
    for name, served in table.items():
        value = values.get(name, served.default)
        value = served.default if value is None else value
        if value not in served.values:
            raise CheckpointError(
                f"{FIELD}: {scope}{name}={reprlib.repr(value)} is not served, only {served.text}; {WAY_OUT}"
            )
    for name, value in values.items():
        if name not in table and name not in known and value not in (None, False, "", [], {}):
            raise CheckpointError(f"{FIELD}: {scope}{name}={reprlib.repr(value)} is not known here; {WAY_OUT}")


def _listed(names: Any, where: str) -> tuple[str, ...]:
    """Names of modules and patterns."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise _not_valid(where, names, "a list of names of modules")
    for name in names:
        try:
            re.compile(name.removeprefix(PATTERN) if name.startswith(PATTERN) else "")
        except re.error as error:
            raise CheckpointError(
                f"{FIELD}: {name!r} in {where} is no regular expression ({error}); correct config.json"
            ) from error
    return tuple(names)


def _not_valid(where: str, value: Any, text: str) -> CheckpointError:
    return CheckpointError(f"{FIELD}: {where}={reprlib.repr(value)} must be {text}; correct config.json")


def _check_modules(found: Quantization, config: Any) -> None:
    """Refuse fused products of which a part is quantised, and a configuration that quantises nothing."""
    covered = 0
    for layer in range(config.num_hidden_layers):
        for modules in (*TOGETHER, ("self_attn.o_proj",), ("mlp.down_proj",)):
            names = [f"model.layers.{layer}.{module}" for module in modules]
            quantised = [name for name in names if found.covers(name)]
            covered += len(quantised)
            if quantised and len(quantised) < len(names):
                left = next(name for name in names if name not in quantised)
                raise CheckpointError(
                    f"{FIELD}: {quantised[0]} is quantised, and {left} is not: they are one product here, and both are "
                    "quantised or none; quantise the checkpoint again, with both in ignore or none"
                )
    if not covered and not expert_count(config):
        raise CheckpointError(
            f"{FIELD}: targets={reprlib.repr(list(found.targets))} and ignore={reprlib.repr(list(found.ignored))} "
            f"leave no layer of this model that is quantised; remove {FIELD} from config.json if no weight is"
        )


def described(scheme: str, ignored: Iterable[str] = ("lm_head",)) -> dict[str, Any]:
    """The field for a checkpoint that is written here.

    Args:
        ignored: the linear layers that are not quantised.
    """
    one: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = one | {"strategy": "channel", "dynamic": False}
    activations = one | {"strategy": "token", "dynamic": True}
    group = {
        "targets": [LINEAR],
        "weights": weights,
        "input_activations": activations if scheme == "w8a8" else None,
        "output_activations": None,
    }
    return {
        "quant_method": METHOD,
        "format": FORMATS[scheme],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }
