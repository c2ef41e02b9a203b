"""Every argument of the stock class's ``from_pretrained``: it does here what it does there, or is refused by name.

:data:`TABLE` says which. What the installed version takes is read from its signature, its documentation and its code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.compat import IS_V4
from qwen2_npu.errors import UnsupportedError
from tests.unit.small import small_config, small_stock

DTYPE = "torch_dtype" if IS_V4 else "dtype"
NOT_ARGUMENTS = {"kwargs", "model_args", "DistributedConfig", "checkpointing", "from_pretrained", "save_pretrained"}
"""What stands in the documentation and is no argument of its own."""


def documented() -> set[str]:
    """The arguments of the installed version."""
    function = PreTrainedModel.from_pretrained
    source = inspect.getsource(function)
    listed = re.findall(r"for name in \[([^\]]*)\]", source)
    return {
        *inspect.signature(function).parameters,
        *re.findall(r"^ +`?(\w+)`? ?\(", function.__doc__ or "", re.MULTILINE),
        *re.findall(r'kwargs\.pop\(\s*"(\w+)"', source),
        *re.findall(r'"(\w+)"', " ".join(listed)),
    } - NOT_ARGUMENTS


class AsStock(NamedTuple):
    """Both models are the same with these values."""

    values: tuple[Any, ...]
    stock_too: bool = True
    """False where the stock class needs accelerate for it: then the model is that without the argument."""


class NoEffect(NamedTuple):
    """About downloads, or how the stock class reads: a local folder is loaded as without it."""

    values: tuple[Any, ...]


class Refused(NamedTuple):
    """With the value that would have an effect; the ones that ask for none are taken."""

    value: Any
    way_out: str
    harmless: tuple[Any, ...] = (None,)


Row = AsStock | NoEffect | Refused

QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}

TABLE: dict[str, Row] = {
    # ---- the same ----
    "pretrained_model_name_or_path": AsStock(("FOLDER",)),
    "config": AsStock((small_config(rms_norm_eps=1e-3), "OTHER CONFIG")),
    "dtype": AsStock(("auto", "float32", torch.bfloat16, "bfloat16", torch.float16)),
    "torch_dtype": AsStock(("auto", torch.float32, torch.bfloat16, torch.float16)),
    "generation_config": AsStock((GenerationConfig(max_new_tokens=7, pad_token_id=0),), stock_too=not IS_V4),
    "subfolder": AsStock(("FOLDER",)),
    "attn_implementation": AsStock((None, "eager", "sdpa"), stock_too=not IS_V4),
    "use_safetensors": AsStock((None, True)),
    "device_map": AsStock((None, "cpu", torch.device("cpu"), {"": "cpu"}), stock_too=False),
    # ---- a local folder is read, one tensor at a time ----
    **dict.fromkeys(("cache_dir", "mirror", "revision", "_commit_hash"), NoEffect(("main",))),
    **dict.fromkeys(("force_download", "local_files_only", "resume_download"), NoEffect((True, False))),
    **dict.fromkeys(("token", "use_auth_token"), NoEffect((None, "hf_x", True))),
    "proxies": NoEffect(({"http": "foo.bar:3128"},)),
    "tqdm_class": NoEffect((None,)),
    **dict.fromkeys(("trust_remote_code", "_from_auto", "weights_only"), NoEffect((True,))),
    "_from_pipeline": NoEffect(("text-generation",)),
    **dict.fromkeys(("low_cpu_mem_usage", "disable_mmap", "_fast_init", "offload_state_dict"), NoEffect((True, False))),
    **dict.fromkeys(("offload_buffers",), NoEffect((True, False))),
    "offload_folder": NoEffect(("/nowhere",)),
    **dict.fromkeys(("allow_all_kernels", "use_flash_attention_2"), NoEffect((True, False))),
    "adapter_kwargs": NoEffect((None, {})),
    "adapter_name": NoEffect(("default",)),
    # ---- refused ----
    "state_dict": Refused({"x": torch.ones(1)}, "from_state_dict"),
    "variant": Refused("fp16", r"weights_file='model\.VARIANT\.safetensors'"),
    "ignore_mismatched_sizes": Refused(True, "correct the checkpoint", (None, False)),
    "output_loading_info": Refused(True, "errors here", (None, False)),
    "key_mapping": Refused({"a": "b"}, "from_state_dict"),
    "quantization_config": Refused(QUANTISED, "bf16, fp16 or fp32"),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), Refused(True, "bf16, fp16 or fp32", (None, False))),
    "gguf_file": Refused("model.gguf", "convert them with transformers"),
    **dict.fromkeys(("from_tf", "from_flax"), Refused(True, "convert them with transformers", (None, False))),
    "max_memory": Refused({0: "1GB"}, "one process uses one device"),
    "device_mesh": Refused("mesh", "one process uses one device"),
    "distributed_config": Refused("config", "one process uses one device"),
    "tp_plan": Refused("auto", "tp_size"),
    "tp_size": Refused(2, "start as many processes"),
    "experts_implementation": Refused("eager", "optimizations="),
    "use_kernels": Refused(True, "optimizations=", (None, False)),
    "kernel_config": Refused({"a": "b"}, "optimizations="),
    "fusion_config": Refused({"a": True}, "optimizations="),
    "_adapter_model_path": Refused("/adapter", r"adapter="),
}


def cases(kind: type) -> list[Any]:
    """(argument, value) of every row of this kind that the installed version knows."""
    known = documented()
    return [
        pytest.param(name, value, id=f"{name}={value}"[:60])
        for name, row in TABLE.items()
        if isinstance(row, kind) and name in known
        for value in ((row.value,) if isinstance(row, Refused) else row.values)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """bfloat16, so that a dtype is one that was asked for; and another configuration beside it."""
    path = tmp_path_factory.mktemp("stock")
    small_stock(dtype=torch.bfloat16).save_pretrained(path, safe_serialization=True)
    small_config(rms_norm_eps=1e-2).save_pretrained(path / "other")
    return path


def call(folder, name: str, value: Any) -> Callable[[Any], Any]:
    """``from_pretrained`` with that argument."""
    arguments = {"pretrained_model_name_or_path": folder} if name == "pretrained_model_name_or_path" else {}
    if name == "subfolder":
        arguments = {"pretrained_model_name_or_path": folder.parent, "subfolder": folder.name}
    elif not arguments:
        given = str(folder / "other") if value == "OTHER CONFIG" else value
        arguments = {"pretrained_model_name_or_path": folder, name: given}
    return lambda cls: cls.from_pretrained(**({DTYPE: "auto"} | arguments if name != "torch_dtype" else arguments))


def check_same(ours: Any, theirs: Any) -> None:
    """What they compute of the same weights is what the other tests are about."""
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    assert ours.config.rms_norm_eps == theirs.config.rms_norm_eps
    assert ours.generation_config.max_new_tokens == theirs.generation_config.max_new_tokens
    assert not ours.training
    mine, other = ours.stock_state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


def test_every_argument_of_the_installed_version_is_decided_on():
    """A new one is met here first."""
    assert len(documented()) > 30
    assert documented() - set(TABLE) == set()


@pytest.mark.parametrize(("name", "value"), cases(AsStock))
def test_what_does_the_same(folder, name, value):
    ours = call(folder, name, value)(Qwen2ForCausalLM)
    row = TABLE[name]
    assert isinstance(row, AsStock)
    stock = call(folder, name, value) if row.stock_too else call(folder, "use_safetensors", None)
    theirs = stock(transformers.Qwen2ForCausalLM).eval()
    if name == "generation_config" and not row.stock_too:
        theirs.generation_config = value
    check_same(ours, theirs)


@pytest.mark.parametrize(("name", "value"), cases(NoEffect))
def test_what_asks_for_nothing_of_a_local_folder(folder, name, value):
    ours = call(folder, name, value)(Qwen2ForCausalLM)
    check_same(ours, call(folder, "use_safetensors", None)(transformers.Qwen2ForCausalLM).eval())


@pytest.mark.parametrize(("name", "value"), cases(Refused))
def test_what_is_refused(folder, name, value):
    """In one line that names the argument, its value and the way out; values that ask for nothing are taken."""
    row = TABLE[name]
    assert isinstance(row, Refused)
    with pytest.raises(UnsupportedError, match=rf"{name}=.*{row.way_out}") as caught:
        call(folder, name, value)(Qwen2ForCausalLM)
    assert "\n" not in str(caught.value)
    for harmless in row.harmless:
        assert isinstance(call(folder, name, harmless)(Qwen2ForCausalLM), Qwen2ForCausalLM)


def test_the_dtype_that_config_json_says(tmp_path):
    """As the stock class of 5.x without a dtype, and of both versions with "auto"; one without is loaded as stored."""
    stock = small_stock()
    stock.config.torch_dtype = torch.bfloat16
    stock.save_pretrained(tmp_path, safe_serialization=True)
    path = tmp_path / "config.json"
    path.write_text(re.sub(r'"(torch_)?dtype": "\w+"', rf'"{DTYPE}": "bfloat16"', path.read_text()))
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, **{DTYPE: "auto"})
    assert Qwen2ForCausalLM.from_pretrained(tmp_path).dtype == theirs.dtype == torch.bfloat16
    assert Qwen2ForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    path.write_text(re.sub(r'"(torch_)?dtype": "\w+",?', "", path.read_text()))
    assert Qwen2ForCausalLM.from_pretrained(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("given", [None, 3], ids=str)
def test_no_folder(given):
    with pytest.raises(
        UnsupportedError, match=r"pretrained_model_name_or_path=.*: pass a local folder.*from_state_dict"
    ):
        Qwen2ForCausalLM.from_pretrained(given)
