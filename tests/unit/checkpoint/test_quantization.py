"""`quantization_config`: the two schemes that are served, and every other one refused by name."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_npu.checkpoint import quantization
from qwen2_npu.checkpoint.configuration import read_config
from qwen2_npu.checkpoint.quantization import ARGUMENTS, FIELD, GROUP, WHOLE, described, parse, quantization_of
from qwen2_npu.errors import CheckpointError
from tests.unit.checkpoint.merges import config_of
from tests.unit.checkpoint.quantised_folders import SCHEMES, quantised_config, quantization_config

WEIGHTS = ("config_groups", "group_0", "weights")
ACTIVATIONS = ("config_groups", "group_0", "input_activations")
GROUP_0 = ("config_groups", "group_0")

LAYER = "model.layers.0."


def said(scheme: str = "w8a8") -> dict[str, Any]:
    """As compressed-tensors 0.20.1 writes it for llm-compressor, with what it leaves out by default in it, too."""
    one = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "block_structure": None}
    weights = one | {"strategy": "channel", "dynamic": False, "actorder": None, "observer": "memoryless_minmax"}
    activations = one | {"strategy": "token", "dynamic": True, "observer": None, "observer_kwargs": {"a": 1}}
    group = {
        "targets": ["Linear"],
        "format": quantization.FORMATS[scheme],
        "input_activations": activations if scheme == "w8a8" else None,
        "output_activations": None,
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": quantization.FORMATS[scheme],
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
    }


def changed(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """``values`` with another value at ``path``."""
    values = copy.deepcopy(values)
    inner = values
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return values


def config(values: Any, **changes: Any) -> Any:
    return config_of(4, 2, quantization_config=values, **changes)


# ---- what is served --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_two_schemes(scheme: str) -> None:
    for values in (said(scheme), described(scheme)):
        found = quantization_of(config(values))
        assert found is not None
        assert found.scheme == scheme
        assert found.packed is (scheme == "w8a16")
        assert found.covers("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("absent", [None, {}, "", False])
def test_no_quantisation(absent: Any) -> None:
    assert quantization_of(config(absent)) is None
    assert quantization_of(config_of(4, 2)) is None


SERVED = [
    (("format",), "naive-quantized"),
    (("format",), "int-quantized"),
    ((*WEIGHTS, "actorder"), "static"),
    ((*WEIGHTS, "actorder"), "weight"),
    ((*WEIGHTS, "actorder"), False),
    ((*WEIGHTS, "group_size"), -1),
    ((*WEIGHTS, "scale_dtype"), "torch.bfloat16"),
    ((*WEIGHTS, "zp_dtype"), "torch.int8"),
    (("sparsity_config",), {"format": "dense", "global_sparsity": 0.1, "targets": []}),
    (("run_compressed",), True),
    (("ignore",), None),
    (("ignore",), []),
    (("ignore",), ("lm_head",)),
    (("dequantize",), True),
    (("use_optimized_inference",), True),
    (("transform_config",), None),
    (("something_new",), None),
    (("something_new",), []),
    (("something_new",), False),
    (("something_new",), ""),
    (("something_new",), {}),
]


@pytest.mark.parametrize(("path", "value"), SERVED, ids=lambda value: str(value)[:40])
def test_what_changes_nothing(path: tuple[str, ...], value: Any) -> None:
    values = changed(said("w8a16"), (*GROUP_0, "format"), None)
    found = quantization_of(config(changed(values, path, value)))
    assert found is not None
    assert found.scheme == "w8a16"


def test_a_strategy_that_follows_from_the_group_size() -> None:
    """Where none is named."""
    values = changed(changed(said(), (*WEIGHTS, "group_size"), -1), (*WEIGHTS, "strategy"), None)
    assert parse(values) == parse(said())
    with pytest.raises(CheckpointError, match=r"weights\.strategy='tensor' is not served"):
        parse(changed(values, (*WEIGHTS, "strategy"), "tensor"))
    with pytest.raises(CheckpointError, match=r"weights\.num_bits=4 is not served"):
        parse(changed(values, (*WEIGHTS, "num_bits"), 4))


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized", "naive-quantized", None])
def test_a_group_may_repeat_the_format(form: str | None) -> None:
    values = changed(said(), ("format",), form or "int-quantized")
    found = parse(changed(values, (*GROUP_0, "format"), form))
    assert found is not None
    assert found.format == (form or "int-quantized")
    assert found.packed is (form == "pack-quantized")


def test_an_order_of_columns_in_activations_may_be_none() -> None:
    assert parse(changed(said(), (*ACTIVATIONS, "actorder"), False)) == parse(said())


def test_fields_that_are_left_out_have_the_package_s_defaults() -> None:
    values = said()
    group = values["config_groups"]["group_0"]
    group["weights"] = {"strategy": "channel"}
    group["input_activations"] = {"strategy": "token", "dynamic": True}
    assert parse(values) == parse(said())


def test_several_groups_with_the_same_settings() -> None:
    values = said()
    group = values["config_groups"]["group_0"]
    values["config_groups"] = {
        "attention": group | {"targets": ["re:.*self_attn.*"]},
        "mlp": group | {"targets": [f"{LAYER}mlp.down_proj"]},
    }
    found = quantization_of(config(values))
    assert found is not None
    assert found.covers(f"{LAYER}self_attn.q_proj")
    assert found.covers(f"{LAYER}mlp.down_proj")
    assert not found.covers(f"{LAYER}mlp.gate_proj")


def test_an_object_of_transformers() -> None:
    """As ``AutoModelForCausalLM.from_pretrained`` leaves it in the configuration of the stock model."""
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    for scheme in SCHEMES:
        assert parse(CompressedTensorsConfig(**said(scheme))) == parse(said(scheme))


def test_only_linear_layers_of_decoder_layers_are_covered() -> None:
    found = parse(changed(said(), ("ignore",), []))
    assert found is not None
    covered = ("self_attn.o_proj", "mlp.up_proj", "mlp.experts.3.up_proj", "mlp.shared_expert.down_proj")
    assert all(found.covers(f"model.layers.11.{name}") for name in covered)
    others = ("lm_head", "score", "model.embed_tokens", "model.norm", f"{LAYER}mlp.gate", f"{LAYER}input_layernorm")
    assert not any(found.covers(name) for name in others)


@pytest.mark.parametrize(
    ("targets", "ignore", "covered"),
    [
        (["Linear"], ["lm_head"], {"q", "o", "gate", "down"}),
        (["Linear"], ["re:.*down_proj$"], {"q", "o", "gate"}),
        (["Linear"], ["re:.*mlp"], {"q", "o"}),
        (["Linear"], ["re:mlp"], {"q", "o", "gate", "down"}),  # a pattern is for the beginning
        (["Linear"], [f"{LAYER}self_attn.o_proj"], {"q", "gate", "down"}),
        (["Linear"], ["self_attn.o_proj"], {"q", "o", "gate", "down"}),  # a name is a whole one
        (["re:.*self_attn.*"], [], {"q", "o"}),
        ([f"{LAYER}mlp.down_proj"], [], {"down"}),
        (["Conv2d", "re:.*o_proj"], ["Embedding"], {"o"}),
    ],
)
def test_targets_and_ignore(targets: list[str], ignore: list[str], covered: set[str]) -> None:
    values = changed(changed(said(), (*GROUP_0, "targets"), targets), ("ignore",), ignore)
    found = quantization_of(config(values, layers=1))
    assert found is not None
    names = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
    assert {short for short, name in names.items() if found.covers(LAYER + name)} == covered


# ---- what is refused -------------------------------------------------------------------------------------------------
METHODS = ["gptq", "awq", "bitsandbytes", "fp8", "hqq", "quanto", "torchao", "quark", "aqlm", "modelopt", None]

REFUSED: list[tuple[tuple[str, ...], Any, str]] = [
    (("format",), "float-quantized", "format='float-quantized' is not served, only pack-quantized, int-"),
    (("format",), "marlin-24", "format='marlin-24'"),
    (("format",), "mixed-precision", "format='mixed-precision'"),
    (("format",), "nvfp4-pack-quantized", "format='nvfp4-pack-quantized'"),
    (("format",), None, "format=None"),
    (("quantization_status",), "frozen", "quantization_status='frozen' is not served, only 'compressed' weights"),
    (("quantization_status",), None, "quantization_status=None"),
    (("kv_cache_scheme",), {"num_bits": 8}, r"kv_cache_scheme=\{'num_bits': 8\} is not served, only a KV cache that"),
    (("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config=.* only dense weights are"),
    (("sparsity_config",), "dense", "sparsity_config='dense' is not served, only dense weights are"),
    (("moe_sparsity_config",), {"method": "prune"}, "moe_sparsity_config=.* only dense weights are"),
    (("transform_config",), {"config_groups": {"R1": 1}}, "transform_config=.* only weights without transforms are"),
    (("modules_to_not_convert",), ["lm_head"], r"modules_to_not_convert=\['lm_head'\] is not known here"),
    ((*GROUP_0, "output_activations"), {"num_bits": 8}, "group_0.output_activations=.* only outputs that are not"),
    ((*GROUP_0, "format"), "float-quantized", "group_0.format='float-quantized'"),
    ((*GROUP_0, "format"), "naive-quantized", "format='int-quantized', and that of its group .* is 'naive-quantized'"),
    ((*GROUP_0, "smooth"), 0.5, "config_groups.group_0.smooth=0.5 is not known here"),
    ((*WEIGHTS, "num_bits"), 4, "group_0.weights.num_bits=4 is not served, only integers of 8 bits are"),
    ((*WEIGHTS, "num_bits"), True, "weights.num_bits=True"),
    ((*WEIGHTS, "type"), "float", "weights.type='float' is not served, only integers of 8 bits are"),
    ((*WEIGHTS, "symmetric"), False, "weights.symmetric=False is not served, only symmetric integers, which have no"),
    ((*WEIGHTS, "group_size"), 128, "weights.group_size=128 is not served, only one scale per output channel is, not"),
    ((*WEIGHTS, "strategy"), "group", "weights.strategy='group' is not served, only strategy 'channel'"),
    ((*WEIGHTS, "strategy"), "tensor", "weights.strategy='tensor'"),
    ((*WEIGHTS, "strategy"), None, "weights.strategy='tensor'"),
    ((*WEIGHTS, "block_structure"), [128, 128], r"weights.block_structure=\[128, 128\]"),
    ((*WEIGHTS, "dynamic"), True, "weights.dynamic=True is not served, only weights with scales of their own"),
    ((*WEIGHTS, "actorder"), "group", "weights.actorder='group' is not served, only columns in their own order"),
    ((*WEIGHTS, "zero_point"), True, "weights.zero_point=True is not known here"),
    ((*ACTIVATIONS, "num_bits"), 4, "input_activations.num_bits=4"),
    ((*ACTIVATIONS, "type"), "float", "input_activations.type='float'"),
    ((*ACTIVATIONS, "symmetric"), False, "input_activations.symmetric=False"),
    ((*ACTIVATIONS, "group_size"), 128, "input_activations.group_size=128"),
    ((*ACTIVATIONS, "group_size"), -1, "input_activations.group_size=-1"),
    ((*ACTIVATIONS, "strategy"), None, "input_activations.strategy='tensor'"),
    ((*ACTIVATIONS, "dynamic"), None, "input_activations.dynamic=False"),
    ((*ACTIVATIONS, "strategy"), "tensor", "input_activations.strategy='tensor' is not served, only strategy 'token'"),
    ((*ACTIVATIONS, "block_structure"), [1, 1], r"input_activations.block_structure=\[1, 1\]"),
    ((*ACTIVATIONS, "dynamic"), False, r"input_activations.dynamic=False is not served, only .* \(dynamic=true\)"),
    ((*ACTIVATIONS, "dynamic"), "local", "input_activations.dynamic='local'"),
    ((*ACTIVATIONS, "actorder"), "weight", "input_activations.actorder='weight'"),
]

NOT_VALID: list[tuple[tuple[str, ...], Any, str]] = [
    (("config_groups",), None, "config_groups=None must be an object with one group of modules"),
    (("config_groups",), {}, "config_groups={} must be an object"),
    (("config_groups",), ["Linear"], r"config_groups=\['Linear'\] must be an object"),
    (("config_groups",), {"W8A8": ["Linear"]}, r"config_groups.W8A8=\['Linear'\] must be an object"),
    (WEIGHTS, None, "config_groups.group_0.weights=None must be an object"),
    (ACTIVATIONS, [8], r"config_groups.group_0.input_activations=\[8\] must be an object"),
    ((*GROUP_0, "targets"), None, "config_groups.group_0.targets=None must be a list of names"),
    ((*GROUP_0, "targets"), "Linear", "targets='Linear' must be a list of names"),
    (("ignore",), [1], r"ignore=\[1\] must be a list of names"),
    (("ignore",), ["lm_head", 1], r"ignore=\['lm_head', 1\] must be a list of names"),
    (("ignore",), ["lm_head", "re:*"], r"'re:\*' in ignore is no regular expression"),
    (("ignore",), ["re:*"], r"'re:\*' in ignore is no regular expression"),
    (("ignore",), ["Linear"], r"ignore=\['Linear'\] leave no layer of this model that is quantised"),
    ((*GROUP_0, "targets"), ["Conv2d"], r"targets=\['Conv2d'\] .* leave no layer"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED + NOT_VALID, ids=lambda value: str(value)[:40])
def test_refused_with_the_field_its_value_and_the_way_out(path: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        quantization_of(config(changed(said(), path, value)))
    text = str(caught.value)
    assert text.startswith(f"{FIELD}: ")
    assert "\n" not in text
    assert re.search(
        r"; (correct|remove|use the checkpoint in bf16, fp16 or fp32, or quantise that with `qwen2-npu)", text
    )


def test_every_field_of_the_tables_is_refused_once() -> None:
    """Else the row of a table could be dropped, or take anything, and no test would tell."""
    tested = {path for path, _, message in REFUSED if "is not known here" not in message}
    tables = {(): WHOLE, GROUP_0: GROUP} | {(*GROUP_0, name): table for name, table in ARGUMENTS.items()}
    assert {(*path, name) for path, table in tables.items() for name in table} == tested


@pytest.mark.parametrize("method", METHODS)
def test_other_methods(method: str | None) -> None:
    for values in ({"quant_method": method, "bits": 8}, changed(said(), ("quant_method",), method), method or "x"):
        name = method if isinstance(values, dict) else values
        with pytest.raises(CheckpointError, match=rf"weights quantised with {name!r}; use the checkpoint in bf16"):
            quantization_of(config(values))


@pytest.mark.parametrize("other", [{"input_activations": None}, {"format": quantization.PACKED}])
@pytest.mark.parametrize("order", [1, -1])
def test_groups_with_different_settings(other: dict[str, Any], order: int) -> None:
    """Whichever comes first."""
    values = said()
    group = values["config_groups"]["group_0"]
    values["config_groups"] = dict(zip("ab", [group, group | other][::order], strict=True))
    with pytest.raises(CheckpointError, match=r"config_groups has 2 groups with different settings \(a, b\)"):
        quantization_of(config(values))


@pytest.mark.parametrize(
    ("ignore", "quantised", "left"),
    [
        (["re:.*k_proj"], "q_proj", "k_proj"),
        (["re:.*layers.1.*q_proj"], "k_proj", "q_proj"),
        (["re:.*v_proj"], "q_proj", "v_proj"),
        (["re:.*[qk]_proj"], "v_proj", "q_proj"),
        (["model.layers.1.mlp.gate_proj"], "up_proj", "gate_proj"),
        (["model.layers.1.mlp.up_proj"], "gate_proj", "up_proj"),
    ],
)
def test_fused_products_are_quantised_alike(ignore: list[str], quantised: str, left: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{quantised} is quantised, and \S+{left} is not: they are one product"):
        quantization_of(config(changed(said(), ("ignore",), ignore)))
    alike = ["re:.*layers.1.*(q|k|v)_proj", "re:.*layers.0.*(gate|up)_proj"]
    assert quantization_of(config(changed(said(), ("ignore",), alike))) is not None


def test_a_folder_is_refused_with_its_file(tmp_path: Path) -> None:
    values = changed(said(), (*WEIGHTS, "num_bits"), 4)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "quantization_config": values}))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/config\.json: quantization_config: .*num_bits=4"):
        read_config(tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_s_configuration_keeps_it(scheme: str, tmp_path: Path) -> None:
    """And transformers reads what is written here."""
    quantised_config(scheme).save_pretrained(tmp_path)
    read = read_config(tmp_path)
    assert quantization_of(read) == parse(json.loads((tmp_path / "config.json").read_text())[FIELD])
    assert quantization_of(type(read).from_pretrained(tmp_path)) == quantization_of(read)


def test_a_mixture_of_experts_may_be_quantised_in_part() -> None:
    """It is dequantised while it is read: nothing is fused in 8 bits."""
    mixture = SimpleNamespace(
        quantization_config=said(), num_hidden_layers=2, model_type="qwen2_moe", num_experts=4, decoder_sparse_step=1
    )
    found = quantization_of(mixture)
    assert found is not None
    assert found.covers(f"{LAYER}mlp.experts.1.gate_proj")
    experts = changed(said(), (*GROUP_0, "targets"), ["re:.*experts.*"])
    mixture.quantization_config = experts
    found = quantization_of(mixture)
    assert found is not None, "no other layer is quantised"
    assert not found.covers(f"{LAYER}self_attn.q_proj")
    with pytest.raises(CheckpointError, match="leave no layer of this model that is quantised"):
        quantization_of(config(experts))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_leaves_nothing_to_defaults(scheme: str) -> None:
    expected = quantization_config(scheme, ("lm_head", "re:.*down_proj"))
    expected["config_groups"]["group_0"]["output_activations"] = None
    assert described(scheme, ["lm_head", "re:.*down_proj"]) == expected | {"kv_cache_scheme": None}
    assert described(scheme)["ignore"] == ["lm_head"]
