"""Weights fused and unfused, read and written: bit-identical, one tensor at a time."""

from __future__ import annotations

import errno
import json
import re
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qwen2_npu import LADDER, Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint import sources, weights
from qwen2_npu.checkpoint.naming import HEAD
from qwen2_npu.compat import IS_V4
from qwen2_npu.conformance.accuracy.stock import HEAD_DIM_IS_FREE
from qwen2_npu.errors import CheckpointError
from qwen2_npu.models import backbone
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import Shard
from tests.unit.mixture import mixture_config, needs_mixtures
from tests.unit.quantised import SCHEMES, quantised_config
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
    original = sources.SafetensorsSource.tensors

    def watched(self, cut):
        for name, tensor in original(self, cut):
            assert sum(ref() is not None for ref in alive) <= 1, f"{name}: an earlier tensor is still in memory"
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    monkeypatch.setattr(sources.SafetensorsSource, "tensors", watched)
    Qwen2ForCausalLM.from_pretrained(folder)
    assert len(alive) == len(sources.open_checkpoint(folder).shapes())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_stay_in_the_dtype_they_are_stored_in(stored):
    weights = stock_weights(small_stock(dtype=stored))
    model = Qwen2ForCausalLM.from_state_dict(small_config(), weights)
    assert {parameter.dtype for parameter in model.parameters()} == {stored}


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtype_by_value_and_by_name(folder, given):
    assert Qwen2ForCausalLM.from_pretrained(folder, dtype=given).dtype == torch.bfloat16
    assert Qwen2ForCausalLM.from_pretrained(folder, torch_dtype=given, device_map="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("way", ["folder", "state dict"])
def test_what_was_loaded_is_for_inference(folder, way):
    """No gradients, which would keep the values of every layer, and no training mode."""
    if way == "folder":
        model = Qwen2ForCausalLM.from_pretrained(folder)
    else:
        model = Qwen2ForCausalLM.from_state_dict(small_config(), stock_weights(small_stock()))
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name, module in model.named_modules() if module.training]
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert not logits.requires_grad
    assert logits.grad_fn is None


def test_old_extras_are_accepted(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    save_file(tensors, shard, metadata={"format": "pt"})
    Qwen2ForCausalLM.from_pretrained(folder)


# ---- before anything is built ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "head_dim": 32}], ids=str
)
@pytest.mark.parametrize("step", ["", *LADDER])
def test_shapes_follow_from_the_configuration(changes, step):
    """What is compared with a folder before a model is built is what the model then has, with any switches."""
    if changes.get("head_dim") and not HEAD_DIM_IS_FREE:
        pytest.skip("transformers 4.37.0 has no head_dim of its own")
    model = Qwen2ForCausalLM(small_config(**changes), Optimizations.up_to(step) if step else Optimizations.none())
    layout = weights.stock_layout(model)
    assert weights.stock_shapes(model.config) == {name: rows.shape for name, rows in layout.items()}
    assert {name: tuple(tensor.shape) for name, tensor in model.stock_state_dict().items()} == weights.stock_shapes(
        model.config
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 20_000},
            "num_hidden_layers=20000, and there are tensors of 3 layers; fetch it again, or",
        ),
        ({"num_hidden_layers": 4}, "12 tensors missing, first model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, "12 tensors unexpected, first model.layers.2.input_layernorm.weight"),
        ({"vocab_size": 2_000_000_000}, "2 tensors mis-shaped, first model.embed_tokens.weight has shape (199, 256)"),
        ({"intermediate_size": 2_000_000_000}, "9 tensors mis-shaped, first model.layers.0.mlp.gate_proj.weight"),
        ({"hidden_size": 2_000_000_000}, "tensors mis-shaped, first model.embed_tokens.weight"),
        (
            {"tie_word_embeddings": True, "num_hidden_layers": 2},
            # 4.37.0 has no use for a head that is not the embedding; 5.x has.
            "lm_head.weight differs from" if IS_V4 else "12 tensors unexpected, first model.layers.2.",
        ),
    ],
    ids=str,
)
def test_a_configuration_of_other_sizes_builds_nothing(folder, changes, message, monkeypatch):
    def built(*args: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(backbone, "Network", built)
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    values.pop("layer_types", None)
    path.write_text(json.dumps(values))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        Qwen2ForCausalLM.from_pretrained(folder)
    assert time.perf_counter() - started < 5
    assert "does not fit its configuration" in str(caught.value)


@pytest.mark.parametrize(
    ("head", "tied", "more", "fits"),
    [
        (weights.CAUSAL_LM, True, [HEAD], True),
        (weights.CAUSAL_LM, False, ["score.weight"], False),
        (("score.weight",), False, ["score.weight", HEAD], True),
        (("score.weight",), False, [HEAD], False),
        ((), False, ["score.weight", "score.bias", HEAD], True),
        ((), False, ["other.weight"], False),
    ],
)
def test_heads_of_other_classes_are_left_where_they_are(head, tied, more, fits):
    """Every class of the family reads the checkpoints of the others, where it has no head of its own to find."""
    config = small_config(num_hidden_layers=1, num_labels=3, tie_word_embeddings=tied)
    shapes = weights.stock_shapes(config, ()) | {name: (3, 256) for name in more}
    if head == weights.CAUSAL_LM and not tied:
        shapes[HEAD] = (199, 256)
    source = SimpleNamespace(config=config, shapes=lambda: shapes)
    with nullcontext() if fits else pytest.raises(CheckpointError, match=r"tensors (missing|unexpected)"):
        weights.check_source(source, head)


@pytest.mark.parametrize(
    ("make", "ranks"),
    [
        (small_config, 1),
        (partial(small_config, tie_word_embeddings=True), 1),
        (small_config, 2),
        *((partial(quantised_config, scheme), 1) for scheme in SCHEMES),
        pytest.param(partial(mixture_config, mlp_only_layers=[0]), 1, marks=needs_mixtures),
        pytest.param(partial(mixture_config, mlp_only_layers=[3]), 2, marks=needs_mixtures),
        pytest.param(partial(mixture_config, decoder_sparse_step=2), 1, marks=needs_mixtures),
    ],
    ids=["dense", "tied", "a rank", *SCHEMES, "first layer dense", "last layer dense, a rank", "every second sparse"],
)
def test_a_model_of_all_memory_is_built_and_one_of_a_byte_more_is_not(make, ranks, monkeypatch):
    """What this rank holds, in the dtypes that it is held in, of layers that are not all of one kind."""
    config, shard = make(num_hidden_layers=5), Shard(ranks - 1, ranks)
    model = Qwen2ForCausalLM(config, None, Ranks(shard))
    needed = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(weights.psutil, "virtual_memory", lambda: SimpleNamespace(total=needed))
    weights.check_room(model.config, shard)
    monkeypatch.setattr(weights.psutil, "virtual_memory", lambda: SimpleNamespace(total=needed - 1))
    fields = r"hidden_size=\d+, intermediate_size=\d+, num_hidden_layers=5, vocab_size=\d+"
    with pytest.raises(MemoryError, match=rf"the weights of this configuration take .*: correct {fields}, or read"):
        weights.check_room(model.config, shard)


def test_a_state_dict_of_a_fused_model_is_named_as_such(folder):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"\.(qkv|gate_up)_proj\.\w+ is fused: .* with stock_state_dict\(\)"):
        Qwen2ForCausalLM.from_state_dict(model.config, model.state_dict())
    Qwen2ForCausalLM.from_state_dict(model.config, model.stock_state_dict())


# ---- saving ---------------------------------------------------------------------------------------------------------
FULL = "I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "over quota"), SafetensorError(FULL)],
    ids=lambda error: f"{type(error).__name__} {error.args[0]}",
)
def test_a_full_disk_leaves_what_was_there(folder, error, monkeypatch):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(CheckpointError, match=r"(No space left on device|over quota).*unchanged. Free space"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_fewer_shards_drops_the_old_ones(folder):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    Qwen2ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_saved_folder_says_which_dtype_it_holds(folder, tmp_path, dtype):
    """Of the weights held, not of the checkpoint that they were read from: "auto" reads them as that."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    assert {written[name] for name in ("dtype", "torch_dtype") if name in written} == {dtype}
    assert "torch_dtype" in written  # 4.37.0 knows no other name
    for tensor in folder_tensors(tmp_path / "ours").values():
        assert tensor.dtype == getattr(torch, dtype)
    assert Qwen2ForCausalLM.from_pretrained(tmp_path / "ours").dtype == getattr(torch, dtype)
    auto = type(small_stock()).from_pretrained(tmp_path / "ours", torch_dtype="auto")
    assert auto.dtype == getattr(torch, dtype)


def test_a_saved_folder_names_no_file_of_the_one_that_was_loaded(folder, tmp_path):
    """transformers 5.x reads the weights that config.json names."""
    for name in ("model.safetensors", "named.safetensors"):
        save_file(folder_tensors(folder), tmp_path / name, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(values | {"transformers_weights": "named.safetensors"}))
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert model.config.transformers_weights == "named.safetensors"
    model.save_pretrained(tmp_path / "ours")
    assert not hasattr(model.config, "transformers_weights")  # as 5.x itself leaves it
    assert "transformers_weights" not in json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    again = type(small_stock()).from_pretrained(tmp_path / "ours").state_dict()
    for name, tensor in folder_tensors(folder).items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("size", ["300KB", "5GB"])
def test_a_saved_folder_is_whole(folder, tmp_path, size):
    """An index of every tensor where there are several files, and what generate() does by default."""
    model = Qwen2ForCausalLM.from_pretrained(folder)
    model.generation_config.max_length = 77
    model.generation_config.eos_token_id = [5, 6]
    model.save_pretrained(tmp_path / "ours", max_shard_size=size)
    names = {path.name: load_file(path).keys() for path in (tmp_path / "ours").glob("*.safetensors")}
    index = tmp_path / "ours" / "model.safetensors.index.json"
    assert index.exists() == (len(names) > 1) == (size == "300KB")
    if len(names) > 1:
        written = json.loads(index.read_text(encoding="utf-8"))
        assert written["weight_map"] == {tensor: file for file, tensors in names.items() for tensor in tensors}
        held = sum(tensor.nbytes for tensor in model.stock_state_dict().values())
        assert written["metadata"]["total_size"] == held
    else:
        assert list(names) == ["model.safetensors"]
    for file in names:  # transformers 4.37 refuses a file that does not say so
        with safe_open(tmp_path / "ours" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}, file
    again = type(small_stock()).from_pretrained(tmp_path / "ours")
    assert (again.generation_config.max_length, again.generation_config.eos_token_id) == (77, [5, 6])
    for name, tensor in model.stock_state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_generate_does_by_default_is_replaced_where_nothing_else_changes(folder):
    """Or removed."""
    model = Qwen2ForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    path, before = folder / "generation_config.json", (folder / "config.json").read_bytes()
    model.generation_config.max_length = 77
    model.save_pretrained(folder)
    assert json.loads(path.read_text(encoding="utf-8"))["max_length"] == 77
    model.generation_config = None
    model.save_pretrained(folder)
    assert not path.exists()
    assert (folder / "config.json").read_bytes() == before


def test_shapes_of_heads():
    config = small_config(num_labels=3, tie_word_embeddings=True)
    hidden = config.hidden_size
    assert weights.head_shapes(config, ("score.weight", "score.bias")) == {
        "score.weight": (3, hidden), "score.bias": (3,),
    }  # fmt: skip
    assert weights.head_shapes(config, weights.CAUSAL_LM) == {}
    config.tie_word_embeddings = False
    assert weights.head_shapes(config, weights.CAUSAL_LM) == {"lm_head.weight": (config.vocab_size, hidden)}
