"""config.json means the same with transformers 4.37.0 and 5.x, to the model and to its baseline, whoever wrote it.

Two faults would hide each other here: a model that computes with another rope_theta than the checkpoint's, and a
baseline that does, too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers import Qwen2ForCausalLM as StockQwen2

from qwen2_npu import Qwen2ForCausalLM, compat
from qwen2_npu.checkpoint.configuration import read_config
from qwen2_npu.checkpoint.merging import merge_qkv
from qwen2_npu.checkpoint.sources import FirstLayers, open_checkpoint
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy import stock
from qwen2_npu.conformance.accuracy.layer_by_layer import LayerByLayer
from qwen2_npu.errors import CheckpointError, UnsupportedError
from tests.unit.small import V4, small_config, small_stock

SAME: dict[str, Any] = {
    "attention_dropout": 0.0, "eos_token_id": [5, 7], "hidden_act": "silu", "hidden_size": 64,
    "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 512, "model_type": "qwen2",
    "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 0,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 199,
}  # fmt: skip
BY_4_37 = SAME | {
    "max_window_layers": 28, "rope_theta": 1000000.0, "sliding_window": 4096, "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0", "use_sliding_window": False,
}  # fmt: skip
BY_5 = SAME | {
    "bos_token_id": None, "dtype": "bfloat16", "layer_types": ["full_attention"] * 3, "max_window_layers": 28,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "sliding_window": None,
    "transformers_version": "5.24.0", "use_sliding_window": False,
}  # fmt: skip
"""One configuration as ``save_pretrained`` of each version writes it."""

FREQUENCIES = (1.0 / (1e6 ** (torch.arange(0, 16, 2).float() / 16))).tolist()

YARN = {"factor": 4.0, "original_max_position_embeddings": 128}

WRITTEN: dict[str, dict[str, Any]] = {
    "4.37.0": BY_4_37,
    "5.x": BY_5,
    "4.37.0, saved again by 5.x with its old fields": BY_4_37 | BY_5,
    "5.x, saved again by 4.37.0": BY_5 | {"rope_theta": 10000.0, "torch_dtype": None, "sliding_window": 4096},
    "5.x, windows that no layer has": BY_5 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "rope_scaling that scales nothing": BY_4_37 | {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
    "both dtypes": BY_4_37 | {"torch_dtype": "float16", "dtype": "bfloat16"},
    "null in place of rope_parameters": BY_4_37 | {"rope_parameters": None, "layer_types": None, "dtype": None},
}
"""All mean the same. (Where two fields contradict each other, the one counts that counts in 5.x.)"""

NOT_ON_4_37: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yarn": (
        BY_4_37 | {"rope_scaling": YARN | {"type": "yarn"}},
        BY_5 | {"rope_parameters": YARN | {"type": "yarn", "rope_type": "yarn", "rope_theta": 1000000.0}},
    ),
    "window": (
        BY_4_37 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        BY_5
        | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
}
"""What has no baseline there, by either version: each pair means the same."""

FIELDS_OF_4_37 = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "rope_theta", "use_sliding_window", "sliding_window", "max_window_layers",
    "attention_dropout", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
"""What 4.37.0 reads of what the model depends on."""


def write(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def meaning(config: Qwen2Config) -> dict[str, Any]:
    """All that the model depends on."""
    frequencies, scaling = compat.rope_frequencies(config)
    names = FIELDS_OF_4_37 - {
        "rope_theta", "use_sliding_window", "sliding_window", "max_window_layers", "torch_dtype",
    }  # fmt: skip
    return {name: getattr(config, name, None) for name in names} | {
        "frequencies": frequencies.tolist(),
        "scaling": scaling,
        "head_dim": compat.head_dim(config),
        "windows": compat.sliding_windows(config),
        "dtype": compat.torch_dtype_of(config),
    }


# ---- reading --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("written", WRITTEN)
def test_one_meaning_whichever_version_wrote_it(written: str, tmp_path: Path) -> None:
    config = read_config(write(tmp_path, WRITTEN[written]))
    found = meaning(config)
    assert found["frequencies"] == FREQUENCIES
    assert found["windows"] == [None, None, None]
    assert (found["dtype"], found["scaling"], found["head_dim"]) == (torch.bfloat16, 1.0, 16)
    assert {name: found[name] for name in SAME if name != "model_type"} == {
        name: value for name, value in SAME.items() if name != "model_type"
    }
    if V4:
        assert not any(getattr(config, name, None) for name in ("rope_parameters", "layer_types", "dtype"))


@pytest.mark.parametrize("kind", NOT_ON_4_37)
def test_what_4_37_computes_otherwise_is_refused_or_means_the_same(kind: str, tmp_path: Path) -> None:
    if V4:
        for values in NOT_ON_4_37[kind]:
            with pytest.raises(
                UnsupportedError, match=r"transformers 4\.37\.0's own Qwen2 .* no baseline to agree with"
            ):
                read_config(write(tmp_path, values))
        return
    old, new = (meaning(read_config(write(tmp_path, values))) for values in NOT_ON_4_37[kind])
    assert old == new
    assert (old["scaling"] > 1) == (kind == "yarn")
    assert old["windows"] == ([None, 8, 8] if kind == "window" else [None] * 3)


@pytest.mark.parametrize("written", WRITTEN)
def test_a_configuration_that_transformers_read(written: str, tmp_path: Path) -> None:
    """4.37.0's reader leaves aside what 5.x wrote; the model looks there all the same."""
    theirs = Qwen2Config.from_pretrained(write(tmp_path, WRITTEN[written]))
    model = Qwen2ForCausalLM(theirs)
    assert meaning(model.config) == meaning(read_config(tmp_path))
    assert model.model.rotary.frequencies[0].tolist() == FREQUENCIES


def test_every_field_that_one_version_alone_has_is_in_the_table() -> None:
    alone = {name for names in compat.OF_4_37 for name in names} - {"rope_scaling"}
    assert set(BY_5) - set(SAME) - FIELDS_OF_4_37 - {"transformers_version"} == alone
    assert set(BY_4_37) - set(SAME) - {"transformers_version"} <= FIELDS_OF_4_37


def test_the_installed_version_writes_what_is_written_here(tmp_path: Path) -> None:
    """So that a version that moves another field is met here first."""
    Qwen2Config.from_dict(dict(BY_4_37)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written | {"transformers_version": ""} == (BY_4_37 if V4 else BY_5) | {"transformers_version": ""}
    assert meaning(read_config(tmp_path)) == meaning(read_config(write(tmp_path, BY_4_37)))


# ---- writing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("written", ["4.37.0", "5.x"])
def test_what_is_saved_is_read_by_the_stock_model_of_both(written: str, tmp_path: Path) -> None:
    config = read_config(write(tmp_path, WRITTEN[written]))
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert values.get("rope_theta") == 1e6
    assert values.get("torch_dtype") == "bfloat16"
    assert values.get("use_sliding_window") is False
    if not V4:
        assert values["rope_parameters"] == BY_5["rope_parameters"]
        assert values["dtype"] == "bfloat16"
    assert meaning(Qwen2Config.from_pretrained(tmp_path / "saved")) == meaning(config)


@pytest.mark.skipif(V4, reason="4.37.0 refuses both")
@pytest.mark.parametrize("kind", NOT_ON_4_37)
def test_what_4_37_does_not_compute_is_saved_as_it_was(kind: str, tmp_path: Path) -> None:
    config = read_config(write(tmp_path, NOT_ON_4_37[kind][1]))
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert meaning(Qwen2Config.from_pretrained(tmp_path / "saved")) == meaning(config)


# ---- fields by keyword ----------------------------------------------------------------------------------------------
LINEAR = {"rope_type": "linear", "factor": 4.0}
SECOND_SLIDES = ["full_attention", "sliding_attention", "full_attention"]

ALIKE: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 2, "rms_norm_eps": 1e-2},
    {"attention_dropout": 0.5},
    *(
        ({"rope_theta": 5e5},)
        if V4
        else (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_scaling": LINEAR | {"rope_theta": 1e6}},
            {"use_sliding_window": True, "sliding_window": 2},  # after layer_types were made: no effect
            {"use_sliding_window": True, "sliding_window": 2, "layer_types": SECOND_SLIDES},
            {"num_hidden_layers": 2, "sliding_window": 2, "layer_types": SECOND_SLIDES},
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        )
    ),
)
"""What the stock class takes: the logits are the same."""

NEITHER: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 0},
    {"num_key_value_heads": None},
    *(
        ({"rope_parameters": {"rope_type": "default"}}, {"rope_scaling": LINEAR})
        if V4
        else (
            {"num_hidden_layers": 4},
            {"rope_theta": 5e5},
            {"rope_scaling": LINEAR},  # it replaces rope_theta, too
            {"rope_scaling": None},
            {"rope_parameters": None},
            {"rope_parameters": {"rope_theta": 5e5}},
            {"layer_types": None},
            {"layer_types": ["full_attention"]},
            {"layer_types": ["chunked_attention"] * 3},
            {"layer_types": SECOND_SLIDES},
        )
    ),
)
"""What it fails on somewhere inside."""


@pytest.fixture(scope="module", params=["with layer_types", "without"])
def three_layers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    small_stock(small_config(rope_theta=1e6)).save_pretrained(folder, safe_serialization=True)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = {"layer_types": ["full_attention"] * 3} if request.param == "with layer_types" else {}
    return write(folder, {name: value for name, value in values.items() if name != "layer_types"} | kinds)


@pytest.mark.parametrize("changes", ALIKE, ids=str)
def test_a_field_by_keyword_has_the_effect_that_it_has_on_the_stock_model(
    changes: dict[str, Any], three_layers: Path, tmp_path: Path
) -> None:
    model = Qwen2ForCausalLM.from_pretrained(three_layers, **changes)
    theirs = StockQwen2.from_pretrained(three_layers, attn_implementation="eager", **changes)
    ids = torch.arange(1, 9).unsqueeze(0)
    logits = model(ids).logits
    assert len(model.model.layers) == len(theirs.model.layers) == changes.get("num_hidden_layers", 3)
    assert torch.allclose(logits, theirs(ids).logits, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(Qwen2ForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    StockQwen2.from_pretrained(tmp_path)


def test_fewer_layers_in_a_configuration_in_memory(three_layers: Path) -> None:
    config = Qwen2Config.from_pretrained(three_layers)
    config.num_hidden_layers = 2
    ids = torch.arange(1, 9).unsqueeze(0)
    theirs = StockQwen2.from_pretrained(three_layers, config=config, attn_implementation="eager")
    ours = Qwen2ForCausalLM.from_pretrained(three_layers, config=config)
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("changes", NEITHER, ids=str)
def test_a_field_by_keyword_that_the_stock_model_fails_on(changes: dict[str, Any], three_layers: Path) -> None:
    with pytest.raises((CheckpointError, UnsupportedError, TypeError)) as caught:
        Qwen2ForCausalLM.from_pretrained(three_layers, **changes)
    own = not isinstance(caught.value, TypeError) or "from_pretrained() takes no argument" in str(caught.value)
    assert own, caught.value


def test_fewer_layers_by_keyword_read_nothing_of_the_others(three_layers: Path) -> None:
    source = FirstLayers(open_checkpoint(three_layers), 1)
    assert {name for name, _ in source.tensors()} == set(source.shapes())
    read: list[str] = []
    inner = open_checkpoint(three_layers)
    pieces = inner.pieces
    inner.pieces = lambda cuts: ((name, read.append(f"{name} {cuts(name)}") or got) for name, got in pieces(cuts))
    assert len(dict(FirstLayers(inner, 1).tensors())) == len(source.shapes())
    others = [line for line in read if "layers.1." in line or "layers.2." in line]
    assert len(others) == 24
    assert all(line.endswith("(Slice(axis=0, start=0, stop=1),)") for line in others)


def test_fewer_layers_of_a_merged_folder(three_layers: Path, tmp_path: Path) -> None:
    merge_qkv(three_layers, tmp_path / "merged", tp_size=2)
    expected = Qwen2ForCausalLM.from_pretrained(three_layers, num_hidden_layers=1).state_dict()
    found = Qwen2ForCausalLM.from_pretrained(tmp_path / "merged", num_hidden_layers=1).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


# ---- the baseline of verify -----------------------------------------------------------------------------------------
@pytest.fixture(params=["4.37.0", "5.x"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The tiny checkpoint with another rope_theta, as a version would have written it."""
    folder = Path(shutil.copytree(tiny.path(), tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    moved = {"rope_parameters", "rope_theta", "layer_types", "dtype", "torch_dtype"}
    values = {name: value for name, value in values.items() if name not in moved}
    layers = ["full_attention"] * values["num_hidden_layers"]
    if request.param == "4.37.0":
        values |= {"rope_theta": 500000.0, "torch_dtype": "float32"}
    else:
        rope = {"rope_theta": 500000.0, "rope_type": "default"}
        values |= {"rope_parameters": rope, "dtype": "float32", "layer_types": layers}
    return write(folder, values)


def test_the_baseline_has_the_checkpoint_s_theta(checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    expected = compat.rope_frequencies(source.config)[0]
    assert torch.allclose(expected, 1.0 / (500000.0 ** (torch.arange(0, len(expected)).float() / len(expected))))
    theirs = Qwen2Config.from_pretrained(checkpoint)  # in memory, as transformers reads it
    for model in (
        stock.stock_from_pretrained(checkpoint),  # of the whole pair
        stock.stock_from_state_dict(theirs, dict(source.tensors())),
        *LayerByLayer(source, torch.float32)._parts("model.layers.0.", 0),  # of the streamed one
        Qwen2ForCausalLM.from_state_dict(theirs, dict(source.tensors())),
    ):
        found = [module.inv_freq for module in model.modules() if hasattr(module, "inv_freq")]
        found += [module.frequencies[0] for module in model.modules() if hasattr(module, "frequencies")]
        assert found
        assert all(torch.equal(each.float(), expected) for each in found)


@pytest.mark.skipif(not V4, reason="5.x keeps no window that is not in use")
def test_the_baseline_of_4_37_has_no_window_that_is_not_in_use() -> None:
    """Its eager attention looks at sliding_window alone. What it computes here is what its other attentions do."""
    config = Qwen2Config.from_dict(BY_4_37 | {"sliding_window": 2, "eos_token_id": None})
    assert not config.use_sliding_window
    weights = small_stock(config).state_dict()
    ids = torch.arange(1, 9).unsqueeze(0)
    baseline = stock.stock_from_state_dict(config, weights)(ids).logits
    config._attn_implementation = "sdpa"
    sdpa = small_stock(config)(ids).logits
    assert torch.allclose(baseline, sdpa, atol=1e-4)
    assert torch.allclose(Qwen2ForCausalLM.from_state_dict(config, weights)(ids).logits, sdpa, atol=1e-4)


@pytest.mark.skipif(not V4, reason="5.x has a baseline for it")
def test_heads_that_4_37_has_no_baseline_for(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"^head_dim=32: transformers 4\.37\.0's own Qwen2 has hidden_size / "):
        stock.with_eager_attention(read_config(write(tmp_path, BY_5 | {"head_dim": 32})))


@pytest.mark.skipif(not V4, reason="5.x keeps no table")
def test_the_baseline_of_4_37_holds_no_table_of_a_million_positions() -> None:
    config = Qwen2Config.from_dict(BY_4_37 | {"max_position_embeddings": 1_010_000})
    model = stock.uninitialised(stock.with_eager_attention(config))
    held = sum(buffer.numel() for name, buffer in model.named_buffers() if "cached" in name)
    assert held <= 2 * 3 * 131072 * 16
