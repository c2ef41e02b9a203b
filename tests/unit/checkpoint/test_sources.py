"""Hugging Face folders as they come: every kind of broken one, and weights in other files than the usual."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import sources
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.parallel.sharding import Slice
from tests.unit.small import small_config, small_stock, stock_weights


@pytest.fixture
def folder(tmp_path):
    """A stock checkpoint of several shards."""
    path = tmp_path / "stock"
    small_stock().save_pretrained(path, max_shard_size="300KB", safe_serialization=True)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- broken folders -------------------------------------------------------------------------------------------------
def break_missing_folder(folder):
    return folder / "nowhere"


def break_no_config(folder):
    (folder / "config.json").unlink()


def break_config_json(folder):
    (folder / "config.json").write_text('{"model_type": "qwen2"')


def break_model_type(folder):
    edit_config(folder, model_type="llama")


def break_quantised(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq"})


def break_kv_heads(folder):
    edit_config(folder, num_key_value_heads=3)


def break_truncated_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])


def break_missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def break_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop(next(iter(tensors))))


def break_extra_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}))


def break_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({next(iter(tensors)): torch.ones(2, 2)}))


def break_no_weights(folder):
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def break_config_list(folder):
    (folder / "config.json").write_text("[]")


def break_quantised_by_name(folder):
    edit_config(folder, quantization_config="gptq")


def break_no_heads(folder):
    edit_config(folder, num_attention_heads=0)


def break_hidden_size(folder):
    edit_config(folder, hidden_size="abc")


def break_index_list(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def break_index_numbers(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')


def break_int8(folder):
    rewrite(folder, lambda tensors: tensors.update({name: t.to(torch.int8) for name, t in tensors.items()}))


def break_generation_config(folder):
    (folder / "generation_config.json").write_text('{"max_length": ')


def break_generation_config_list(folder):
    (folder / "generation_config.json").write_text("[]")


def break_only_pickled(folder):
    break_no_weights(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def rewrite(folder, change):
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (break_missing_folder, r"nowhere' is not a folder: .*nothing is downloaded"),
        (break_no_config, r"has no config\.json"),
        (break_config_json, r"config\.json is not valid JSON"),
        (break_model_type, r"model_type='llama'.*'qwen2'"),
        (break_quantised, r"quantised with 'gptq'"),
        (break_kv_heads, r"num_key_value_heads=3 does not divide num_attention_heads=4"),
        (break_truncated_shard, r"model-00002-of-.* is truncated or damaged .*fetch this file again"),
        (break_missing_shard, r"1 of \d+ shards .* missing, first model-00002-of-"),
        (break_missing_tensor, r"1 tensors missing, first "),
        (break_extra_tensor, r"1 tensors unexpected, first model\.layers\.9\.mlp\.up_proj\.weight"),
        (break_shape, r"1 tensors mis-shaped, first .* has shape \(2, 2\), expected"),
        (break_no_weights, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
        (break_index, r"index\.json is not a valid index: weight_map=None"),
        (break_index_list, r"index\.json holds a list in place of a JSON object; fetch it again"),
        (break_index_numbers, r"index\.json is not a valid index: weight_map=\{'a': 1\}.*fetch it again"),
        (break_config_list, r"config\.json holds a list in place of a JSON object; fetch it again"),
        (break_quantised_by_name, r"quantised with 'gptq'; use the checkpoint in bf16"),
        (break_no_heads, r"num_attention_heads=0|num_attention_heads.* 0"),
        (break_hidden_size, r"config\.json: hidden_size='abc' must be an integer from 1 to \d+; correct it"),
        (break_int8, r"model-00001-of-.*: .* is stored as I8, which is quantised.*; use the checkpoint in bf16"),
        (break_generation_config, r"generation_config\.json is not valid JSON .*; fetch it again"),
        (break_generation_config_list, r"generation_config\.json holds a list .*; fetch it again"),
        (
            break_only_pickled,
            r"it has pytorch_model\.bin\.index\.json.*weights_file='pytorch_model\.bin\.index\.json'",
        ),
    ],
    ids=lambda value: value.__name__.removeprefix("break_") if callable(value) else "",
)
def test_broken_folders_are_one_clear_error(folder, breakage, message):
    path = breakage(folder) or folder
    with pytest.raises(CheckpointError, match=message) as caught:
        Qwen2ForCausalLM.from_pretrained(path)
    assert "\n" not in str(caught.value)


# ---- files of more than one checkpoint ------------------------------------------------------------------------------
def test_a_tensor_in_two_shards(folder):
    """Shards of two ways to split a checkpoint: the names are all there, and one tensor twice."""
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"tensor \S+ is in {first.name} and in {second.name}, which are not of one"
    ):
        Qwen2ForCausalLM.from_pretrained(folder)


def test_a_whole_file_comes_before_an_index_as_for_transformers(folder):
    whole = {name: tensor + 1 for name, tensor in stock_weights(small_stock()).items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for loaded in (Qwen2ForCausalLM.from_pretrained(folder), type(small_stock()).from_pretrained(folder)):
        assert torch.equal(loaded.model.norm.weight, whole["model.norm.weight"])


def test_what_replaces_a_shard_meanwhile_is_not_met(folder):
    source = sources.open_checkpoint(folder)
    expected = stock_weights(small_stock())
    other = {name: tensor + 1 for name, tensor in expected.items()}
    for shard in folder.glob("*.safetensors"):
        replaced = {name: other[name] for name in load_file(shard)}
        save_file(replaced, folder / "new", metadata={"format": "pt"})
        (folder / "new").rename(shard)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in source.tensors())
    assert all(torch.equal(tensor, other[name]) for name, tensor in source.tensors()), "the second time it is there"


def test_tensors_by_name_as_often_as_asked_for(folder):
    expected = stock_weights(small_stock())
    source = sources.open_checkpoint(folder)
    for names in (["model.norm.weight", "lm_head.weight"], list(expected), ["model.norm.weight"], []):
        found = source.read(names)
        assert set(found) == set(names)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    in_memory = sources.StateDictSource(small_stock().config, expected)
    assert in_memory.read(["lm_head.weight"])["lm_head.weight"] is expected["lm_head.weight"]


@pytest.mark.parametrize("how", ["replaced", "written to", "removed"])
def test_tensors_by_name_are_of_the_checkpoint_that_was_opened(folder, how):
    source = sources.open_checkpoint(folder)
    name = "model.norm.weight"
    shard = folder / source._file_of[name]
    content = shard.read_bytes()
    if how == "written to":
        with shard.open("r+b") as file:
            file.write(content)
        os.utime(shard, ns=(0, 0))
    else:
        shard.unlink()
    if how == "replaced":
        shard.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        source.read([name])
    assert str(shard) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("start again" in str(caught.value)) is (how != "removed")


@pytest.mark.parametrize("field", ["st_dev", "st_ino", "st_size", "st_mtime_ns"])
def test_what_tells_a_file_from_the_one_that_was_opened(field):
    """Each alone: another disk may have a file of the same number, size and time."""
    values = dict.fromkeys(("st_dev", "st_ino", "st_size", "st_mtime_ns"), 1)
    opened, same, other = (
        sources._version(SimpleNamespace(stat=lambda status=status: SimpleNamespace(**status)))
        for status in (values, values | {"st_atime_ns": 2}, values | {field: 2})
    )
    assert opened == same != other


@pytest.mark.parametrize("layers", [1, 2, 10, 11])
def test_the_first_layers_are_those_of_the_lowest_numbers(layers):
    """And what belongs to no layer."""
    numbers = {f"model.layers.{number}.mlp.up_proj.weight": number for number in range(12)}
    numbers |= dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"), -1)
    state = {name: torch.full((2, 3), float(number)) for name, number in numbers.items()}
    first = sources.FirstLayers(sources.StateDictSource(small_config(), state), layers)
    wanted = {name: state[name][1:] for name, number in numbers.items() if number < layers}
    assert first.shapes() == dict.fromkeys(wanted, (2, 3))
    found = dict(first.tensors(lambda name: Slice(0, 1, 2)))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_unknown_dtype_names_the_supported_ones(folder):
    with pytest.raises(UnsupportedError, match=r"dtype='int8'; supported are float32, bfloat16"):
        Qwen2ForCausalLM.from_pretrained(folder, dtype="int8")


# ---- pickled weights, and others by name ----------------------------------------------------------------------------
@pytest.fixture
def pickled(folder):
    """The same checkpoint as one pickled file."""
    break_no_weights(folder)
    torch.save(stock_weights(small_stock()), folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_only_by_name(pickled):
    with pytest.raises(CheckpointError, match=r"pass weights_file='pytorch_model.bin'"):
        Qwen2ForCausalLM.from_pretrained(pickled)
    model = Qwen2ForCausalLM.from_pretrained(pickled, weights_file="pytorch_model.bin")
    assert torch.equal(model.model.norm.weight, small_stock().model.norm.weight)


def test_the_command_that_converts_pickled_weights_does(pickled):
    """The commands have no option for pickled files: they say how to convert them."""
    with pytest.raises(CheckpointError, match=r"`python -c") as caught:
        sources.open_checkpoint(pickled)
    command = f"M.from_pretrained('{pickled}', weights_file='pytorch_model.bin').save_pretrained('{pickled}')\"`"
    assert command in str(caught.value)
    Qwen2ForCausalLM.from_pretrained(pickled, weights_file="pytorch_model.bin").save_pretrained(pickled)
    assert (
        sources.open_checkpoint(pickled).shapes()
        == sources.open_checkpoint(pickled, weights_file="pytorch_model.bin").shapes()
    )


def test_pickled_shards_by_their_index(pickled):
    weights = stock_weights(small_stock())
    names = sorted(weights)
    shards = {"a.bin": names[: len(names) // 2], "b.bin": names[len(names) // 2 :]}
    for file, part in shards.items():
        torch.save({name: weights[name] for name in part}, pickled / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = pickled / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    model = Qwen2ForCausalLM.from_pretrained(pickled, weights_file=index.name)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.stock_state_dict().items())


@pytest.mark.parametrize("zipped", [True, False], ids=["", "of an old torch"])
def test_pickled_weights_of_a_card_that_is_not_here(pickled, zipped, monkeypatch):
    path, weights = pickled / "pytorch_model.bin", stock_weights(small_stock())
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "_package_registry", [(0, lambda storage: "cuda:97", lambda *_: None)])
        torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:97" in path.read_bytes()
    found = dict(sources.open_checkpoint(pickled, weights_file=path.name).tensors())
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_a_named_safetensors_file_is_the_one_that_is_read(folder):
    other = {name: tensor + 1 for name, tensor in stock_weights(small_stock()).items()}
    save_file(other, folder / "model.fp16.safetensors")
    model = Qwen2ForCausalLM.from_pretrained(folder, weights_file="model.fp16.safetensors")
    assert torch.equal(model.model.norm.weight, other["model.norm.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"pytorch_model\.bin holds a list in place of a state dict"),
        ({"epoch": 3}, r": epoch is stored as int, which is quantised or no weight"),
        ({"w": torch.ones(2, dtype=torch.int8)}, r": w is stored as torch\.int8, .*use the checkpoint in bf16"),
    ],
)
def test_a_pickled_file_of_something_else(pickled, content, message):
    torch.save(content, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        Qwen2ForCausalLM.from_pretrained(pickled, weights_file="pytorch_model.bin")


def test_a_weights_file_that_is_not_there(folder):
    with pytest.raises(CheckpointError, match=r"weights_file='x\.bin': .*x\.bin does not exist"):
        Qwen2ForCausalLM.from_pretrained(folder, weights_file="x.bin")
