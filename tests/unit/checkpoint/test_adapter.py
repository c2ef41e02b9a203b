"""LoRA adapters merged while a checkpoint is read, against W + scaling · B · A in numpy float64, and against peft."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint import adapter as adapters
from qwen2_npu.checkpoint.merging import merge_qkv
from qwen2_npu.errors import CheckpointError, UnsupportedError
from tests.unit.small import small_stock, stock_weights

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model", "r": 4, "lora_alpha": 6,
    "target_modules": list(PRODUCTS), "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
    "lora_dropout": 0.1, "modules_to_save": None, "use_dora": False, "use_rslora": False, "rank_pattern": {},
    "alpha_pattern": {}, "megatron_core": "megatron.core", "loftq_config": {}, "inference_mode": True,
}  # fmt: skip
SWITCHES = [Optimizations.none(), Optimizations.only("fused_qkv"), Optimizations.only("fused_gate_up"), None]


@pytest.fixture(scope="module")
def stock():
    return small_stock()


@pytest.fixture(scope="module")
def base(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    stock.save_pretrained(path, safe_serialization=True)
    return path


def targets(weights, names=PRODUCTS):
    return [name.removesuffix(".weight") for name in weights if name.split(".")[-2] in names and "weight" in name]


def write(folder, stock, modules=None, prefix="base_model.model.", rank=lambda module: 4, **changes):
    """An adapter of large random numbers; return what a test needs to add it itself."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    weights, tensors = stock_weights(stock), {}
    generator = torch.Generator().manual_seed(3)
    for module in targets(weights) if modules is None else modules:
        rows, columns = weights[f"{module}.weight"].shape
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank(module), columns, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank(module), generator=generator) * 0.05
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return tensors


def on_a_norm(folder, stock):
    write(folder, stock, [])
    name = "base_model.model.model.layers.0.input_layernorm.lora_A.weight"
    save_file({name: torch.ones(4, 256)}, folder / "adapter_model.safetensors")


def summed(stock, tensors, scaling=lambda module: 1.5):
    """W + scaling · B · A, float64."""
    expected = {name: tensor.double().numpy() for name, tensor in stock_weights(stock).items()}
    for name in tensors:
        if "lora_A" in name:
            module = name.removesuffix(".lora_A.weight")
            a, b = (tensors[f"{module}.lora_{part}.weight"].double().numpy() for part in "AB")
            expected[f"{module}.weight"] = expected[f"{module}.weight"] + scaling(module) * (b @ a)
    return expected


def check(model, expected, tolerance=1e-6):
    found = model.stock_state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert np.abs(tensor.double().numpy() - expected[name]).max() < tolerance, name


# ---- what is added ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizations", SWITCHES, ids=str)
def test_every_product_gets_its_part(base, stock, tmp_path, optimizations):
    tensors = write(tmp_path / "lora", stock)
    model = Qwen2ForCausalLM.from_pretrained(base, adapter=tmp_path / "lora", optimizations=optimizations)
    check(model, summed(stock, tensors))
    assert model.name_or_path == str(base)


def test_a_model_with_an_adapter_computes_what_the_stock_model_does_with_the_sum(base, stock, tmp_path):
    expected = summed(stock, write(tmp_path / "lora", stock))
    other = small_stock()
    other.load_state_dict({name: torch.from_numpy(value).float() for name, value in expected.items()}, strict=False)
    ids = torch.arange(1, 13)[None]
    ours = Qwen2ForCausalLM.from_pretrained(base, adapter=str(tmp_path / "lora"))
    with torch.no_grad():
        wanted = other(ids).logits
        assert (ours(ids).logits - wanted).abs().max() < 5e-4
        assert (stock(ids).logits - wanted).abs().max() > 1


@pytest.mark.parametrize(
    ("changes", "modules", "rank", "scaling"),
    [
        ({"use_rslora": True}, None, lambda module: 4, lambda module: 6 / math.sqrt(4)),
        ({"target_modules": "all-linear"}, None, lambda module: 4, lambda module: 1.5),
        (
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 20}},
            None,
            lambda module: 2 if "q_proj" in module else 4,
            lambda module: 3.0 if "q_proj" in module else 5.0 if "1.mlp.up_proj" in module else 1.5,
        ),
        (
            {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 2]},
            [f"model.layers.{i}.{name}" for i in (0, 2) for name in ("self_attn.v_proj", "mlp.up_proj")],
            lambda module: 4,
            lambda module: 1.5,
        ),
        (
            {"target_modules": r".*\.1\.self_attn\.(q|k)_proj", "layers_pattern": "layers"},
            [f"model.layers.1.self_attn.{name}_proj" for name in "qk"],
            lambda module: 4,
            lambda module: 1.5,
        ),
        (
            {"target_modules": ["lm_head", "model.layers.2.mlp.gate_proj", "q_proj"], "exclude_modules": ["q_proj"]},
            ["lm_head", "model.layers.2.mlp.gate_proj"],
            lambda module: 4,
            lambda module: 1.5,
        ),
    ],
    ids=["rslora", "all-linear", "patterns", "layers", "regular expression", "names and exceptions"],
)
def test_what_the_configuration_of_an_adapter_says(base, stock, tmp_path, changes, modules, rank, scaling):
    tensors = write(tmp_path / "lora", stock, modules, rank=rank, **changes)
    check(Qwen2ForCausalLM.from_pretrained(base, adapter=tmp_path / "lora"), summed(stock, tensors, scaling))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_sum_is_rounded_once(stored, tmp_path):
    """Not the stored weights first, nor what is added."""
    stock, base = small_stock(dtype=stored), tmp_path / "base"
    stock.save_pretrained(base, safe_serialization=True)
    tensors = write(tmp_path / "lora", stock)
    model = Qwen2ForCausalLM.from_pretrained(base, adapter=tmp_path / "lora", dtype="bfloat16")
    wanted = {name: torch.from_numpy(value).bfloat16() for name, value in summed(stock, tensors).items()}
    found = model.stock_state_dict()
    same = [(found[name] == wanted[name]).double().mean() for name in wanted]
    assert min(same) > 0.999  # float32 and float64 differ beside a tie


@pytest.mark.parametrize(
    ("names", "module", "targeted"),
    [
        (["gate"], "model.layers.0.mlp.gate", True),
        (["gate"], "model.layers.0.mlp.shared_expert_gate", False),
        (["proj"], "model.layers.0.self_attn.q_proj", False),
        (["self_attn.q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["attn.q_proj"], "model.layers.0.self_attn.q_proj", False),
        (["lm_head"], "lm_head", True),
    ],
)
def test_a_target_is_named_by_whole_parts_of_its_name(names, module, targeted):
    assert adapters._targeted({"target_modules": names}, module) is targeted


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [("q_proj", 2), (r"layers\.1\..*", 2), ("self_attn", 4), ("proj", 4), ("1.self_attn.q_proj", 2)],
)
def test_a_pattern_is_of_the_end_of_a_name(pattern, rank):
    """As in peft."""
    config = {"r": 4, "rank_pattern": {pattern: 2}}
    assert adapters._of_module(config, "r", "rank_pattern", "model.layers.1.self_attn.q_proj") == rank


def test_an_adapter_trained_on_the_model_without_its_head(base, stock, tmp_path):
    tensors = write(tmp_path / "lora", stock, prefix="")
    named = {f"base_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "lora" / "adapter_model.safetensors")
    check(Qwen2ForCausalLM.from_pretrained(base, adapter=tmp_path / "lora"), summed(stock, tensors))


def test_every_rank_gets_its_part(base, stock, tmp_path):
    """Whatever is cut, from an ordinary folder and from a merged one."""
    write(tmp_path / "lora", stock)
    merge_qkv(base, tmp_path / "merged", tp_size=2)
    whole = Qwen2ForCausalLM.from_pretrained(base, adapter=tmp_path / "lora").stock_state_dict()
    expected = Qwen2ForCausalLM.from_state_dict(stock.config, whole, tp_size=2, tp_rank=1).state_dict()
    for folder in (base, tmp_path / "merged"):
        part = Qwen2ForCausalLM.from_pretrained(folder, adapter=tmp_path / "lora", tp_size=2, tp_rank=1).state_dict()
        for name, tensor in expected.items():
            assert (part[name] - tensor).abs().max() < 1e-6, name


# ---- where it is -----------------------------------------------------------------------------------------------------
def test_the_folder_of_an_adapter_in_place_of_the_model(base, stock, tmp_path):
    tensors = write(tmp_path / "lora", stock, base_model_name_or_path=str(base))
    check(Qwen2ForCausalLM.from_pretrained(tmp_path / "lora"), summed(stock, tensors))
    write(tmp_path / "lora", stock)
    with pytest.raises(CheckpointError, match=r"adapter of the model 'some/model', which is no folder here .*adapter="):
        Qwen2ForCausalLM.from_pretrained(tmp_path / "lora")


def test_an_adapter_in_a_subfolder(base, stock, tmp_path):
    """It is looked for where the model is, and names a base that is elsewhere."""
    tensors = write(tmp_path / "lora", stock, base_model_name_or_path=str(base))
    check(Qwen2ForCausalLM.from_pretrained(tmp_path, subfolder="lora"), summed(stock, tensors))


def test_a_folder_with_a_model_and_an_adapter(stock, tmp_path, monkeypatch):
    """The stock class applies the adapter where peft is installed: here the caller says."""
    stock.save_pretrained(tmp_path, safe_serialization=True)
    tensors = write(tmp_path, stock)
    monkeypatch.setattr(adapters, "is_peft_available", lambda: True)
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json: .*; pass adapter='.*' .* or adapter=False"):
        Qwen2ForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    check(Qwen2ForCausalLM.from_pretrained(tmp_path), summed(stock, {}))
    check(Qwen2ForCausalLM.from_pretrained(tmp_path, adapter=False), summed(stock, {}))
    merged = Qwen2ForCausalLM.from_pretrained(tmp_path, adapter=tmp_path)
    check(merged, summed(stock, tensors))
    with pytest.raises(CheckpointError, match=r"holds an adapter .* would be applied to the saved weights"):
        merged.save_pretrained(tmp_path)
    merged.save_pretrained(tmp_path / "merged")
    check(Qwen2ForCausalLM.from_pretrained(tmp_path / "merged"), summed(stock, tensors))


@pytest.mark.parametrize("given", [True, 3, ["a"]], ids=str)
def test_what_is_no_folder(base, given):
    with pytest.raises(UnsupportedError, match=r"adapter=.*: pass the folder of a LoRA adapter, or False"):
        Qwen2ForCausalLM.from_pretrained(base, adapter=given)


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", "PREFIX_TUNING"),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.gate"]),
        ("trainable_token_indices", [3]),
        ("alora_invocation_tokens", [1, 2]),
        ("a_field_of_tomorrow", {"power": 9}),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(base, stock, tmp_path, field, value):
    write(tmp_path / "lora", stock, **{field: value})
    with pytest.raises(UnsupportedError, match=rf"{field}={re.escape(repr(value))} is not served.*merge_and_unload"):
        Qwen2ForCausalLM.from_pretrained(base, adapter=tmp_path / "lora")


SERVED = (
    *(("peft_type", "LORA"), ("bias", "none")),
    *(("init_lora_weights", value) for value in (True, False, "gaussian", "orthogonal", "eva")),
    *((name, 3) for name in ("r", "lora_alpha", "qalora_group_size")),
    *((name, {"a": 3}) for name in ("rank_pattern", "alpha_pattern", "auto_mapping", "eva_config", "runtime_config")),
    *((name, ["a"]) for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")),
    *((name, "a") for name in ("base_model_name_or_path", "megatron_core", "peft_version", "revision", "task_type")),
    *((name, True) for name in ("use_rslora", "ensure_weight_tying", "inference_mode")),
    ("lora_dropout", 0.5),
    *(("a_field_of_tomorrow", value) for value in (None, False, "", [], {})),
)
"""Fields of an adapter with values that they may have."""


def test_plain_lora_is_served_whatever_the_values_of_its_fields(tmp_path):
    for name, value in SERVED:
        adapters._check_served({name: value}, tmp_path)
    fields = {name for name, _ in SERVED} - {"a_field_of_tomorrow"}
    assert fields == {*adapters.READ, *adapters.SELECTING, *adapters.WITHOUT_EFFECT, *adapters.SERVED}


def _another_base(folder, stock):
    write(folder, stock)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor[:, :2].contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )


def _half(folder, stock):
    write(folder, stock)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    save_file(tensors, folder / "adapter_model.safetensors")


def _with(name):
    def write_it(folder, stock):
        write(folder, stock)
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(tensors | {name: torch.ones(2, 2)}, folder / "adapter_model.safetensors")

    return write_it


def _no_weights(folder, stock):
    write(folder, stock)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _cut_off(folder, stock):
    write(folder, stock)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("written", "error", "message"),
    [
        (lambda folder, stock: None, CheckpointError, r"is no folder of an adapter: it has no adapter_config\.json"),
        (_no_weights, CheckpointError, r"has no adapter_model\.safetensors \(no pickled file is read\)"),
        (_cut_off, CheckpointError, r"adapter_model\.safetensors \(\d+ bytes\) is truncated or damaged"),
        (_another_base, CheckpointError, r"lora_A \(4, 2\) and lora_B \(\d+, 2\), expected \(4, \d+\) and \(\d+, 4\)"),
        (_half, CheckpointError, r"lora_A or lora_B is missing of 1 of 21 products.*layers\.1\.mlp\.up_proj; fetch it"),
        (
            _with("base_model.model.model.embed_tokens.lora_embedding_A"),
            UnsupportedError,
            r"embed_tokens\.lora_embedding_A is no part of a LoRA product of this model; merge it with peft",
        ),
        (_with("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"), UnsupportedError, "is no part of a LoRA"),
        (
            lambda folder, stock: write(folder, stock, [], target_modules=["w_pack"]),
            CheckpointError,
            r"missing of 0 of 0 products, and 0 more are there; fetch it again",
        ),
        (
            lambda folder, stock: write(folder, stock, target_modules=["q_proj"]),
            CheckpointError,
            r"missing of 0 of 3 products, and 18 more are there, first of model\.layers\.\d\.\S*[^q]_proj; fetch it",
        ),
        (
            lambda folder, stock: write(folder, stock, target_modules="(q_proj"),
            CheckpointError,
            r"adapter_config\.json: .*; save the adapter again",
        ),
        (
            lambda folder, stock: write(folder, stock, rank_pattern={"(": 2}),
            CheckpointError,
            r"adapter_config\.json: .*; save the adapter again",
        ),
        (
            lambda folder, stock: write(folder, stock, target_modules=None),
            CheckpointError,
            r"adapter_config\.json: .*; save the adapter again",
        ),
        (lambda folder, stock: write(folder, stock, r=0), CheckpointError, r"r=0 and lora_alpha=6 .*positive integer"),
        (lambda folder, stock: write(folder, stock, lora_alpha="x"), CheckpointError, r"lora_alpha='x'"),
        (lambda folder, stock: write(folder, stock, lora_alpha=True), CheckpointError, r"lora_alpha=True"),
        (lambda folder, stock: write(folder, stock, lora_alpha=math.inf), CheckpointError, r"lora_alpha=inf"),
        (lambda folder, stock: write(folder, stock, rank=lambda module: 1, r=True), CheckpointError, r"r=True and"),
        (
            lambda folder, stock: on_a_norm(folder, stock),
            UnsupportedError,
            r"input_layernorm\.lora_A\.weight is no part of a LoRA product of this model",
        ),
        (lambda folder, stock: write(folder, stock, r=8), CheckpointError, r"lora_A \(4, \d+\).* expected \(8, \d+\)"),
    ],
)
def test_an_adapter_that_cannot_be_used(base, stock, tmp_path, written, error, message):
    written(tmp_path / "lora", stock)
    with pytest.raises(error, match=message) as caught:
        Qwen2ForCausalLM.from_pretrained(base, adapter=tmp_path / "lora")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("change", [(1, 0), (0, 1), (-1, 0), (0, -1)], ids=str)
def test_parts_that_fit_neither_the_weight_nor_the_rank(tmp_path, part, change):
    """A row or a column more or fewer; a weight of 5 x 7, and r=3."""
    shapes = {"A": (3, 7), "B": (5, 3)}
    shapes[part] = (shapes[part][0] + change[0], shapes[part][1] + change[1])
    parts = {name: torch.ones(size) for name, size in shapes.items()}
    message = f"q has lora_A {shapes['A']} and lora_B {shapes['B']}, expected (3, 7) and (5, 3) for r=3; pass the model"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        adapters._low_rank("q", parts, {"r": 3, "lora_alpha": 6}, tmp_path, (5, 7))


def test_quantised_parts_are_refused(base, stock, tmp_path):
    tensors = write(tmp_path / "lora", stock)
    quantised = {f"base_model.model.{name}": tensor.to(torch.int8) for name, tensor in tensors.items()}
    save_file(quantised, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is stored as I8, which is quantised"):
        Qwen2ForCausalLM.from_pretrained(base, adapter=tmp_path / "lora")


# ---- beside peft -----------------------------------------------------------------------------------------------------
@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def test_the_configuration_that_peft_writes_is_decided_on(peft, tmp_path):
    """A field that a new version of peft adds is met here first: nothing that it writes by default is refused."""
    peft.LoraConfig(target_modules=list(PRODUCTS)).save_pretrained(tmp_path)
    adapters._check_served(json.loads((tmp_path / "adapter_config.json").read_text()), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 3}},
        {"target_modules": r".*\.(gate|up)_proj", "alpha_pattern": {"up_proj": 30}},
        {"target_modules": list(PRODUCTS), "layers_to_transform": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
def test_as_peft_merges_it(peft, base, tmp_path, changes, optimizations):
    """The stock model in float64, merged by peft, from the adapter that peft saved."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(
        small_stock(dtype=torch.float64),
        peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **changes),
    )
    wrapped.save_pretrained(tmp_path / "lora")
    merged = wrapped.merge_and_unload()
    model = Qwen2ForCausalLM.from_pretrained(base, adapter=tmp_path / "lora", optimizations=optimizations)
    check(model, {name: tensor.numpy() for name, tensor in stock_weights(merged).items()})


def test_peft_puts_nothing_into_fused_products(peft, base, stock, tmp_path):
    """Half of an adapter would be there without a word."""
    write(tmp_path / "lora", stock)
    ids = torch.arange(1, 9)[None]
    way_out = r"fused or cut .* load it merged with from_pretrained\(FOLDER, adapter=FOLDER_OF_THE_ADAPTER\)"
    for optimizations in SWITCHES[1:]:
        model = Qwen2ForCausalLM.from_pretrained(base, optimizations=optimizations)
        before = [type(module) for module in model.modules()]
        for target in ("all-linear", ["q_proj"], ["o_proj"]):
            with pytest.raises(UnsupportedError, match=way_out):
                peft.get_peft_model(model, peft.LoraConfig(target_modules=target, task_type="CAUSAL_LM"))
        with pytest.raises(UnsupportedError, match=way_out):
            peft.PeftModel.from_pretrained(model, tmp_path / "lora")
        with pytest.raises(UnsupportedError, match=way_out):
            peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM"))
        assert [type(module) for module in model.modules()] == before
        assert torch.isfinite(model(ids).logits).all()


def test_transformers_own_adapters_are_refused_by_name(base):
    """With peft or without it."""
    model = Qwen2ForCausalLM.from_pretrained(base)
    for call in (model.load_adapter, model.add_adapter):
        with pytest.raises(UnsupportedError, match=rf"^{call.__name__}\(\): .*adapter=FOLDER_OF_THE_ADAPTER"):
            call("lora")


def test_peft_works_where_nothing_is_fused(peft, base, stock, tmp_path):
    write(tmp_path / "lora", stock)
    ids = torch.arange(1, 9)[None]
    ours = Qwen2ForCausalLM.from_pretrained(base, optimizations=Optimizations.none())
    wrapped = [peft.PeftModel.from_pretrained(model, tmp_path / "lora") for model in (ours, small_stock())]
    with torch.no_grad():
        mine, other = (model(ids).logits for model in wrapped)
        assert (mine - other).abs().max() < 5e-4
        assert (mine - stock(ids).logits).abs().max() > 1
        one, two = (model.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for model in wrapped)
    assert torch.equal(one, two)
    with pytest.raises(UnsupportedError, match=r"save_pretrained\(\): peft has put an adapter into this model; .*"):
        ours.save_pretrained(tmp_path / "x")
    merged = wrapped[0].merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = Qwen2ForCausalLM.from_pretrained(tmp_path / "merged")
    assert (again(ids).logits - mine).abs().max() < 5e-4
    ours = peft.PeftModel.from_pretrained(
        Qwen2ForCausalLM.from_pretrained(base, optimizations=Optimizations.none()), tmp_path / "lora"
    ).unload()
    with torch.no_grad():
        assert (ours(ids).logits - stock(ids).logits).abs().max() < 2e-4


def test_prompts_that_were_trained(peft, stock):
    """Prompt tuning passes embeddings and works; prefix tuning passes a cache of its own kind."""
    ids = torch.arange(1, 9)[None]
    ours = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock))
    tuned = []
    for model in (ours, small_stock()):
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        tuned.append(peft.get_peft_model(model, config))
    with torch.no_grad():
        assert (tuned[0](ids).logits - tuned[1](ids).logits).abs().max() < 2e-4
    prefix = peft.get_peft_model(ours, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="allocate_cache"):
        prefix(ids)
