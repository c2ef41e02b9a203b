"""Reading and writing Hugging Face folders: bit-identical, one tensor at a time, and every kind of broken folder."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu import Optimizations, Qwen2ForCausalLM, checkpoint
from qwen2_npu.errors import CheckpointError, UnsupportedError
from tests.unit.small import small_config, small_stock, stock_weights


def folder_tensors(folder) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


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


# ---- round trips ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
def test_load_and_save_is_bit_identical(tmp_path, dtype, tied, optimizations):
    stock = small_stock(small_config(tie_word_embeddings=tied), dtype)
    stock.save_pretrained(tmp_path / "stock", max_shard_size="200KB", safe_serialization=True)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "stock", optimizations=optimizations)
    assert model.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "ours", max_shard_size="150KB")
    before, after = folder_tensors(tmp_path / "stock"), folder_tensors(tmp_path / "ours")
    assert before.keys() == after.keys() == stock_weights(stock).keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_stock_reads_what_we_wrote(tmp_path, folder):
    Qwen2ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    reread = type(small_stock()).from_pretrained(tmp_path / "ours")
    assert torch.equal(
        reread.model.layers[1].self_attn.k_proj.bias, small_stock().model.layers[1].self_attn.k_proj.bias
    )


def test_fused_rows_are_q_k_v_and_gate_up(folder):
    stock = small_stock()
    model = Qwen2ForCausalLM.from_pretrained(folder)
    attention, mlp = stock.model.layers[2].self_attn, stock.model.layers[2].mlp
    ours = model.model.layers[2]
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(ours.self_attn.qkv_proj.weight, torch.cat(parts))
    assert torch.equal(ours.mlp.gate_up_proj.weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))


def test_stock_state_dict_is_views_not_copies(folder):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    fused = model.model.layers[0].self_attn.qkv_proj.weight
    view = model.stock_state_dict()["model.layers.0.self_attn.k_proj.weight"]
    assert view.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_loading_reads_one_tensor_at_a_time(folder, monkeypatch):
    """While a weight is read, nothing else is: every tensor of the source is dropped before the next one."""
    import weakref

    alive: list[weakref.ref] = []
    original = checkpoint.SafetensorsSource.tensors

    def watched(self):
        for name, tensor in original(self):
            assert sum(ref() is not None for ref in alive) <= 1, f"{name}: an earlier tensor is still in memory"
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    monkeypatch.setattr(checkpoint.SafetensorsSource, "tensors", watched)
    Qwen2ForCausalLM.from_pretrained(folder)
    assert len(alive) == len(checkpoint.SafetensorsSource(folder, small_config()).shapes())


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtype_by_value_and_by_name(folder, given):
    assert Qwen2ForCausalLM.from_pretrained(folder, dtype=given).dtype == torch.bfloat16
    assert Qwen2ForCausalLM.from_pretrained(folder, torch_dtype=given, device_map="auto").dtype == torch.bfloat16


def test_old_extras_are_accepted(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    save_file(tensors, shard, metadata={"format": "pt"})
    Qwen2ForCausalLM.from_pretrained(folder)


def test_pickled_weights_only_by_name(tmp_path, folder):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((folder / "config.json").read_text())
    torch.save(stock_weights(small_stock()), pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pass weights_file='pytorch_model.bin'"):
        Qwen2ForCausalLM.from_pretrained(pickled)
    model = Qwen2ForCausalLM.from_pretrained(pickled, weights_file="pytorch_model.bin")
    assert torch.equal(model.model.norm.weight, small_stock().model.norm.weight)


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


def rewrite(folder, change):
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (break_missing_folder, r"nowhere' is no folder: .*nothing is downloaded"),
        (break_no_config, r"has no config\.json"),
        (break_config_json, r"config\.json is no valid JSON"),
        (break_model_type, r"model_type='llama'.*'qwen2'"),
        (break_quantised, r"quantised with 'gptq'"),
        (break_kv_heads, r"num_key_value_heads=3 does not divide num_attention_heads=4"),
        (break_truncated_shard, r"model-00002-of-.* is truncated or damaged .*fetch this file again"),
        (break_missing_shard, r"1 of \d+ shards .* missing, first model-00002-of-"),
        (break_missing_tensor, r"1 tensors missing, first "),
        (break_extra_tensor, r"1 tensors unexpected, first model\.layers\.9\.mlp\.up_proj\.weight"),
        (break_shape, r"1 tensors mis-shaped, first .* has shape \(2, 2\), expected"),
        (break_no_weights, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
        (break_index, r"no valid index"),
    ],
    ids=lambda value: value.__name__.removeprefix("break_") if callable(value) else "",
)
def test_broken_folders_are_one_clear_error(folder, breakage, message):
    path = breakage(folder) or folder
    with pytest.raises(CheckpointError, match=message):
        Qwen2ForCausalLM.from_pretrained(path)


def test_unknown_dtype_names_the_supported_ones(folder):
    with pytest.raises(UnsupportedError, match=r"dtype='int8'; supported are float32, bfloat16"):
        Qwen2ForCausalLM.from_pretrained(folder, dtype="int8")


# ---- saving ---------------------------------------------------------------------------------------------------------
def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*unchanged. Free space"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_fewer_shards_drops_the_old_ones(folder):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    Qwen2ForCausalLM.from_pretrained(folder)


def test_pickle_is_never_written(folder, tmp_path):
    with pytest.raises(UnsupportedError, match="safetensors only"):
        Qwen2ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "x", safe_serialization=False)
