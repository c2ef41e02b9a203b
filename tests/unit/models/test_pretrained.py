"""transformers' keywords of ``from_pretrained`` and ``save_pretrained``: taken, honoured, or refused by name."""

from __future__ import annotations

import contextlib
import inspect
import re
import shutil
from functools import partial

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel

from qwen2_npu import Optimizations, Qwen2ForCausalLM, Qwen2Model
from qwen2_npu.compat import set_torch_dtype
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.models import pretrained
from qwen2_npu.parallel.agreement import fingerprint
from qwen2_npu.parallel.collectives import Ranks
from tests.unit.checkpoint.test_adapter import write
from tests.unit.small import V4, small_config, small_stock


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stock")
    small_stock().save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return Qwen2ForCausalLM.from_pretrained(folder)


# ---- loading --------------------------------------------------------------------------------------------------------
HARMLESS = (
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "adapter_kwargs", "adapter_name", "allow_all_kernels",
    "cache_dir", "disable_mmap", "force_download", "local_files_only", "low_cpu_mem_usage", "mirror", "offload_buffers",
    "offload_folder", "offload_state_dict", "proxies", "resume_download", "revision", "token", "tqdm_class",
    "trust_remote_code", "use_auth_token", "use_flash_attention_2", "weights_only",
)  # fmt: skip
REFUSED = (
    "_adapter_model_path", "attn_implementation", "device_mesh", "distributed_config", "experts_implementation",
    "from_flax", "from_tf", "fusion_config", "gguf_file", "ignore_mismatched_sizes", "kernel_config", "key_mapping",
    "load_in_4bit", "load_in_8bit", "max_memory", "output_loading_info", "quantization_config", "state_dict", "tp_plan",
    "use_kernels", "use_safetensors", "variant",
)  # fmt: skip
"""Keywords of some version of transformers, by hand: none may be lost from the tables."""

UNSET = (None, False, "")
DEFAULTS = {
    "attn_implementation": (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3"),
    "use_safetensors": (None, True),
    "safe_serialization": (None, True),
}
"""Values that ask for nothing, where they are others than UNSET."""


def test_keywords_that_ask_for_nothing(folder):
    """Every harmless keyword with a value, every refused one with the values that mean its default."""
    assert {*pretrained.LOADING_REFUSED} == {*REFUSED}
    given = dict.fromkeys(HARMLESS, "x")
    for name in REFUSED:
        for value in DEFAULTS.get(name, UNSET):
            assert not pretrained.effective("from_pretrained", {name: value}, (), pretrained.LOADING_REFUSED)
            given[name] = value
    assert isinstance(Qwen2ForCausalLM.from_pretrained(folder, **given), Qwen2ForCausalLM)


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_unset_elsewhere_may_be_a_choice(name):
    for table in (pretrained.LOADING_REFUSED, pretrained.SAVING_REFUSED):
        if name in table:
            with pytest.raises(UnsupportedError, match=rf"^f\({name}=False\): "):
                pretrained.effective("f", {name: False}, (), table)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
def test_a_usual_call(folder, implementation):
    Qwen2ForCausalLM.from_pretrained(
        folder, attn_implementation=implementation, local_files_only=True, use_safetensors=True, revision="main",
        cache_dir="/nowhere", token=None, low_cpu_mem_usage=True, quantization_config=None, max_memory=None,
    )  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused_by_name_and_value(folder, name):
    with pytest.raises(UnsupportedError, match=rf"^from_pretrained\({name}='x\.y'\): \w.{{20,}}") as caught:
        Qwen2ForCausalLM.from_pretrained(folder, **{name: "x.y"})
    assert "\n" not in str(caught.value)


def test_a_long_value_is_cut(folder):
    with pytest.raises(UnsupportedError, match=r"state_dict=.*from_state_dict") as caught:
        Qwen2ForCausalLM.from_pretrained(folder, state_dict={str(i): torch.ones(30, 30) for i in range(99)})
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_fields_of_the_configuration_are_changed(folder):
    model = Qwen2ForCausalLM.from_pretrained(folder, use_cache=False, rms_norm_eps=1e-3)
    assert (model.config.use_cache, model.config.rms_norm_eps) == (False, 1e-3)
    with torch.no_grad():
        stock = type(small_stock()).from_pretrained(folder, rms_norm_eps=1e-3)
        ids = torch.arange(1, 9)[None]
        assert (model(ids).logits - stock(ids).logits).abs().max() < 2e-4


def test_a_changed_size_does_not_fit_the_weights(folder):
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \(199, 256\), expected \(200, 256\)"):
        Qwen2ForCausalLM.from_pretrained(folder, vocab_size=200)
    with pytest.raises(CheckpointError, match=r"num_key_value_heads=3 does not divide"):
        Qwen2ForCausalLM.from_pretrained(folder, num_key_value_heads=3)


def test_a_keyword_that_nobody_knows(folder):
    with pytest.raises(TypeError, match=r"takes no argument warp_drive: it is neither a keyword of transformers nor"):
        Qwen2ForCausalLM.from_pretrained(folder, warp_drive=9)
    with pytest.raises(TypeError, match=r"takes no argument use_cache: with config= a Qwen2Config, set its fields"):
        Qwen2ForCausalLM.from_pretrained(folder, config=small_config(), use_cache=False)


def test_config_is_one_or_the_folder_of_one(folder, tmp_path):
    small_config(rms_norm_eps=1e-3).save_pretrained(tmp_path)
    for config in (tmp_path, str(tmp_path), small_config(rms_norm_eps=1e-3)):
        assert Qwen2ForCausalLM.from_pretrained(folder, config=config).config.rms_norm_eps == 1e-3
    assert Qwen2ForCausalLM.from_pretrained(folder, config=str(tmp_path), use_cache=False).config.use_cache is False
    with pytest.raises(CheckpointError, match=r"model path '.*nowhere' is not a folder"):
        Qwen2ForCausalLM.from_pretrained(folder, config=tmp_path / "nowhere")
    with pytest.raises(UnsupportedError, match=r"config=LlamaConfig: pass a Qwen2Config, or a folder"):
        Qwen2ForCausalLM.from_pretrained(folder, config=LlamaConfig())
    small_config(num_hidden_layers=2).save_pretrained(tmp_path)  # in a folder it is no wish for fewer
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\."):
        Qwen2ForCausalLM.from_pretrained(folder, config=tmp_path)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["a config in hand", "the folder of one"])
def test_the_keywords_act_together(folder, model, elsewhere, tmp_path):
    """Weights of another name, in a subfolder without a configuration, in another dtype than that one says."""
    (tmp_path / "weights").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "weights" / "other.safetensors")
    found = Qwen2ForCausalLM.from_pretrained(
        tmp_path,
        subfolder="weights",
        weights_file="other.safetensors",
        config=folder if elsewhere else small_config(),
        dtype=torch.bfloat16,
        optimizations=Optimizations.none(),
        generation_config=(given := GenerationConfig(max_new_tokens=7)),
    )
    assert (found.dtype, found.generation_config, found.optimizations) == (torch.bfloat16, given, Optimizations.none())
    weights = model.stock_state_dict()
    assert all(torch.equal(tensor, weights[name].bfloat16()) for name, tensor in found.stock_state_dict().items())


def test_subfolder_and_generation_config(folder):
    given = GenerationConfig(max_new_tokens=7, pad_token_id=0)
    model = Qwen2ForCausalLM.from_pretrained(folder.parent, subfolder=folder.name, generation_config=given)
    assert model.generation_config is given
    assert Qwen2ForCausalLM.from_pretrained(folder, subfolder=None).config.vocab_size == model.config.vocab_size


@pytest.mark.parametrize(
    ("stored", "given", "expected"),
    [
        (None, {}, torch.float32),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.bfloat16, {"dtype": "auto"}, torch.bfloat16),
        (torch.bfloat16, {"torch_dtype": "auto"}, torch.bfloat16),
        (torch.bfloat16, {"dtype": "float16"}, torch.float16),
        (torch.bfloat16, {"torch_dtype": torch.float16}, torch.float16),
        (torch.bfloat16, {"dtype": torch.float32, "torch_dtype": "float16"}, torch.float32),
    ],
    ids=str,
)
def test_the_dtype_is_the_caller_s_or_else_that_of_the_configuration(folder, stored, given, expected):
    """The weights are stored in float32."""
    config = small_config()
    set_torch_dtype(config, stored)
    model = Qwen2ForCausalLM.from_pretrained(folder, config=config, **given)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("given", [None, torch.float16], ids=str)
def test_weights_in_memory_keep_their_dtype_unless_another_is_given(model, given):
    """Whatever the configuration says: they need not be of the checkpoint that it describes."""
    config = small_config()
    set_torch_dtype(config, torch.bfloat16)
    made = Qwen2ForCausalLM.from_state_dict(config, model.stock_state_dict(), dtype=given)
    assert {parameter.dtype for parameter in made.parameters()} == {given or torch.float32}


@torch.no_grad()
def test_the_first_layers_alone(folder, model):
    """Asked for by number, or by a configuration in hand; that of a folder must be the checkpoint's own."""
    ids = torch.arange(1, 9)[None]
    expected = model.model.norm(model(ids, output_hidden_states=True).hidden_states[1], None)[0]
    for given in ({"num_hidden_layers": 1}, {"config": small_config(num_hidden_layers=1)}):
        one = Qwen2ForCausalLM.from_pretrained(folder, **given)
        assert len(one.model.layers) == one.config.num_hidden_layers == 1
        assert (one(ids).logits - one.lm_head(expected)).abs().max() < 2e-4


def test_the_folder_s_own_generation_configuration_and_name(folder, tmp_path):
    small_stock().save_pretrained(tmp_path, safe_serialization=True)
    GenerationConfig(max_new_tokens=5, pad_token_id=3).save_pretrained(tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(str(tmp_path))
    assert (model.generation_config.max_new_tokens, model.generation_config.pad_token_id) == (5, 3)
    assert model.name_or_path == model.config._name_or_path == str(tmp_path)
    given = GenerationConfig(max_new_tokens=7)
    assert Qwen2ForCausalLM.from_pretrained(tmp_path, generation_config=given).generation_config is given
    assert getattr(Qwen2Model.from_pretrained(tmp_path), "generation_config", None) is None
    for configured in ({"config": small_config()}, {"config": folder}, {"use_cache": False}):
        assert Qwen2ForCausalLM.from_pretrained(tmp_path, **configured).generation_config.max_new_tokens == 5


@pytest.mark.parametrize("given", [{"a": 1}, None, 3], ids=str)
def test_what_is_no_folder_is_refused_by_name(given):
    with pytest.raises(
        UnsupportedError, match=r"^pretrained_model_name_or_path=.*: pass a local folder; weights in mem"
    ):
        Qwen2ForCausalLM.from_pretrained(given)


@pytest.mark.parametrize("adapted", [False, True], ids=["", "with an adapter"])
def test_ranks_compare_the_files_that_they_have_read(folder, adapted, tmp_path, monkeypatch):
    """By their content, the adapter's, too; and none is kept from the folder while they wait for one another."""
    lora, held, compared = tmp_path / "lora", [], []
    write(lora, small_stock())

    @contextlib.contextmanager
    def locked(path, *, shared=False):
        held.append((path, shared))
        yield True
        held.clear()

    def agree(facts, *, way_out):
        assert not held
        compared.append((dict(facts), way_out))

    read = pretrained.sources.open_checkpoint
    monkeypatch.setattr(pretrained, "current", lambda *given: Ranks(group="a group"))
    monkeypatch.setattr(pretrained, "locked", locked)
    monkeypatch.setattr(pretrained, "agree", agree)
    monkeypatch.setattr(
        pretrained.sources, "open_checkpoint",
        lambda *given, **options: read(*given, **options) if held == [(folder, True)] else pytest.fail("not held"),
    )  # fmt: skip
    Qwen2ForCausalLM.from_pretrained(folder, adapter=lora if adapted else None)
    of_adapter = {f"the adapter's {name}": mark for name, mark in fingerprint(lora).items()} if adapted else {}
    assert compared == [(fingerprint(folder) | of_adapter, f"copy one checkpoint to all nodes ({folder})")]


# ---- devices --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"device": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"model": "cpu", "lm_head": torch.device("cpu")}},
        {"device_map": "cpu", "device": torch.device("cpu")},
    ],
    ids=str,
)
def test_one_device(folder, given):
    assert Qwen2ForCausalLM.from_pretrained(folder, **given).device == torch.device("cpu")


@pytest.mark.parametrize("spread", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_model_that_may_be_spread_goes_to_the_accelerator_or_else_the_cpu(spread, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert pretrained.one_device(None, spread) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    with pytest.raises(UnsupportedError, match=r"'meta'.*: not usable here"):
        pretrained.one_device(None, spread)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, r"device_map=\{.*'disk'\}: one process uses one device"),
        ({"device": "cpu", "device_map": "cuda:1"}, r"device='cpu', device_map='cuda:1': one process uses one device"),
        ({"device": "nope"}, r"device='nope': not usable here"),
        ({"device_map": "nope"}, r"device='nope': not usable here"),
        ({"device": "meta"}, r"device='meta': not usable here"),
    ],
    ids=str,
)
def test_other_devices_are_refused_in_one_line(folder, given, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        Qwen2ForCausalLM.from_pretrained(folder, **given)
    assert "\n" not in str(caught.value)


def test_from_state_dict_refuses_the_same(model):
    with pytest.raises(UnsupportedError, match="device='nope': not usable here"):
        Qwen2ForCausalLM.from_state_dict(model.config, model.stock_state_dict(), device="nope")
    quantised = {name: tensor.to(torch.int8) for name, tensor in model.stock_state_dict().items()}
    with pytest.raises(CheckpointError, match=r"^the state dict: .* is stored as torch\.int8"):
        Qwen2ForCausalLM.from_state_dict(model.config, quantised)


# ---- saving ---------------------------------------------------------------------------------------------------------
SAVING = ("push_to_hub", "state_dict", "save_function", "variant", "distributed_checkpoint", "safe_serialization")
"""Those of ``save_pretrained`` that are refused, by hand."""


def test_save_keywords_that_ask_for_nothing(model, tmp_path):
    given = dict.fromkeys(("save_peft_format", "save_original_format", "token", "use_auth_token"), "x")
    for name in SAVING:
        for value in DEFAULTS.get(name, UNSET):
            assert not pretrained.effective("save_pretrained", {name: value}, (), pretrained.SAVING_REFUSED)
            given[name] = value
    model.save_pretrained(tmp_path / "ours", is_main_process=True, **given)
    assert (tmp_path / "ours" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", sorted({*SAVING, *pretrained.SAVING_REFUSED}))
def test_save_keywords_that_would_be_ignored(model, tmp_path, name):
    with pytest.raises(UnsupportedError, match=rf"^save_pretrained\({name}='x\.y'\): \w.{{20,}}"):
        model.save_pretrained(tmp_path / "x", **{name: "x.y"})
    assert not (tmp_path / "x").exists()


def test_pickle_is_never_written(model, tmp_path):
    with pytest.raises(UnsupportedError, match=r"safe_serialization=False.*safetensors only"):
        model.save_pretrained(tmp_path / "x", safe_serialization=False)


def test_only_the_main_process_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_without_a_word_of_other_processes_this_one_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "x")
    assert (tmp_path / "x" / "config.json").exists()


def test_a_save_keyword_that_nobody_knows(model, tmp_path):
    with pytest.raises(TypeError, match=r"save_pretrained\(\) takes no argument warp_drive"):
        model.save_pretrained(tmp_path / "x", warp_drive=9)


# ---- the tables ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("function", "known"),
    [
        ("from_pretrained", {*pretrained.LOADING_HARMLESS, *pretrained.LOADING_REFUSED}),
        ("save_pretrained", {*pretrained.SAVING_HARMLESS, *pretrained.SAVING_REFUSED}),
    ],
)
def test_every_keyword_of_transformers_is_decided_on(function, known):
    """What the installed version lists in its signature, so that a new one is met here first."""
    ours = inspect.signature(getattr(Qwen2ForCausalLM, function)).parameters
    theirs = {
        name
        for name, parameter in inspect.signature(getattr(PreTrainedModel, function)).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name != "self"
    }
    assert theirs <= known | set(ours)


OLDER = (
    "use_flash_attention_2", "load_in_4bit", "load_in_8bit", "use_auth_token", "offload_state_dict", "mirror",
    "low_cpu_mem_usage", "from_flax", "from_tf", "_fast_init", "resume_download",
)  # fmt: skip
"""Keywords of earlier releases, which programs still pass."""


@pytest.mark.skipif(V4, reason="what 5.x reads")
def test_every_keyword_that_transformers_takes_out_of_the_others_is_decided_on():
    known = {*pretrained.LOADING_HARMLESS, *pretrained.LOADING_REFUSED}
    known |= set(inspect.signature(Qwen2ForCausalLM.from_pretrained).parameters)
    taken = re.findall(r"kwargs\.(?:pop|get)\(\s*\"(\w+)\"", inspect.getsource(PreTrainedModel.from_pretrained))
    assert len(taken) > 20
    assert {*taken, *OLDER} <= known


# ---- parts ----------------------------------------------------------------------------------------------------------
def test_a_part_is_neither_saved_nor_given_adapters(model, tmp_path):
    part = Qwen2ForCausalLM.from_state_dict(
        model.config, model.stock_state_dict(), optimizations=Optimizations.none(), tp_size=2, tp_rank=1
    )
    saves = [partial(part.save_pretrained, tmp_path / "part", is_main_process=main) for main in (True, False)]
    for call in (*saves, part.stock_state_dict):
        with pytest.raises(UnsupportedError, match=r"\(\): this is part 1 of 2 of a model; load it with tp_size=1"):
            call()
    assert not (tmp_path / "part").exists()
    for call in (part.add_adapter, part.load_adapter):
        with pytest.raises(
            UnsupportedError, match=r"_adapter\(\): q, k, v, gate and up are fused or cut in this model"
        ):
            call("adapter")


@pytest.mark.parametrize("step", ["fused_qkv", "fused_gate_up"])
def test_fused_products_take_no_adapter(model, step):
    fused = Qwen2ForCausalLM(model.config, Optimizations.only(step))
    with pytest.raises(UnsupportedError, match=r"add_adapter\(\): q, k, v, gate and up are fused or cut in this model"):
        fused.add_adapter("adapter")


# ---- load_state_dict ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keywords", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_weights_of_the_stock_model_are_not_loaded_into_fused_ones(folder, keywords):
    """Without strict, torch would leave them as they are without a word."""
    model = Qwen2ForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = small_stock(seed=1)
    with pytest.raises(
        UnsupportedError, match=r"_proj\.\w+ is a weight of the stock model.*\.from_state_dict\(config,"
    ):
        model.load_state_dict(stock.state_dict(), **keywords)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    copied = Qwen2ForCausalLM.from_state_dict(model.config, stock.state_dict())
    assert torch.equal(copied.model.layers[0].mlp.down_proj.weight, stock.model.layers[0].mlp.down_proj.weight)


def test_weights_of_the_same_class_are_loaded(folder):
    """And those of the stock class where nothing is fused."""
    stock = small_stock(seed=1)
    other = Qwen2ForCausalLM.from_state_dict(stock.config, stock.state_dict())
    model = Qwen2ForCausalLM.from_pretrained(folder)
    assert not any(model.load_state_dict(other.state_dict()))
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in model.stock_state_dict().items())
    plain = Qwen2ForCausalLM.from_pretrained(folder, optimizations=Optimizations.none())
    assert not any(plain.load_state_dict(stock.state_dict()))
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in plain.stock_state_dict().items())
    assert model.load_state_dict({}, strict=False).missing_keys
    assert model.load_state_dict({"other": torch.ones(1)}, False).unexpected_keys == ["other"]  # as torch says it
