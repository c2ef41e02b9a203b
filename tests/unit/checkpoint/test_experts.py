"""The experts' tensors one by one and stacked, in memory and through a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint.experts import one_by_one, stacked
from qwen2_npu.conformance.accuracy.configs import SHAPES, random_state_dict, small_config
from qwen2_npu.conformance.accuracy.stock import stock_from_state_dict
from qwen2_npu.errors import CheckpointError

SHAPE, EXPERTS, HIDDEN, COLUMNS = "qwen2-57b-a14b", 3, 4, 5
SCOPE = "model.layers.1.mlp.experts"

needs_mixture = pytest.mark.skipif(SHAPE not in SHAPES, reason="transformers 4.37.0 has no Qwen2Moe")


def alone(experts: int = EXPERTS) -> dict[str, torch.Tensor]:
    """Of one layer, numbers that say which tensor they are of."""
    state: dict[str, torch.Tensor] = {"model.norm.weight": torch.zeros(HIDDEN)}
    for expert in range(experts):
        for place, (part, shape) in enumerate(
            {"gate_proj": (COLUMNS, HIDDEN), "up_proj": (COLUMNS, HIDDEN), "down_proj": (HIDDEN, COLUMNS)}.items()
        ):
            state[f"{SCOPE}.{expert}.{part}.weight"] = torch.arange(20.0).view(shape) + 100 * place + 1000 * expert
    return state


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["whole", "of a base model"])
def test_stacked_and_back(prefix: str) -> None:
    state = {prefix + name.removeprefix("model."): tensor for name, tensor in alone().items()}
    found, scope = stacked(state), prefix + SCOPE.removeprefix("model.")
    assert found.keys() == {f"{prefix}norm.weight", f"{scope}.gate_up_proj", f"{scope}.down_proj"}
    assert found[f"{scope}.gate_up_proj"].shape == (EXPERTS, 2 * COLUMNS, HIDDEN)
    assert found[f"{scope}.down_proj"].shape == (EXPERTS, HIDDEN, COLUMNS)
    back = one_by_one(found)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_experts_go_by_number_and_not_by_the_order_of_their_names() -> None:
    state = alone(experts=11)
    shuffled = dict(sorted(state.items()))  # 10 comes before 2
    assert list(shuffled) != list(state)
    assert torch.equal(stacked(shuffled)[f"{SCOPE}.down_proj"], stacked(state)[f"{SCOPE}.down_proj"])
    assert stacked(shuffled)[f"{SCOPE}.down_proj"][10, 0, 0] == 10200


def test_what_is_one_by_one_stays() -> None:
    state = alone()
    assert one_by_one(state).keys() == state.keys()
    dense = {"model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2), "model.layers.0.mlp.down_proj.weight": None}
    assert one_by_one(dense) == stacked(dense) == dense
    for sizes in ((2, 2), (2, 2, 2, 2)):  # no stack: whoever loads it says so by its own name
        other = {f"{SCOPE}.gate_up_proj": torch.ones(sizes)}
        assert one_by_one(other) == other
    convolution = {"model.vision.weight": torch.ones(2, 2, 2)}
    assert one_by_one(convolution) == convolution


def test_what_only_has_the_name_of_stacked_experts_stays_for_the_check_of_shapes() -> None:
    given = {"model.layers.0.mlp.experts.down_proj": torch.ones(4, 6), "model.layers.0.mlp.experts.gate_up_proj": None}
    assert one_by_one(given) == given  # type: ignore[arg-type]


def test_one_by_one_takes_no_memory() -> None:
    found = stacked(alone())
    for name, tensor in one_by_one(found).items():
        kind = "down_proj" if "down_proj" in name else "gate_up_proj"
        if "experts" in name:
            assert tensor.untyped_storage().data_ptr() == found[f"{SCOPE}.{kind}"].untyped_storage().data_ptr()


# ---- folders --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state_dict(small_config(SHAPE), dtype=torch.bfloat16)


@pytest.fixture
def folder(state: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A stock checkpoint."""
    stock_from_state_dict(small_config(SHAPE), state, dtype=torch.bfloat16).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@needs_mixture
@pytest.mark.parametrize(
    "optimizations", [Optimizations.none(), Optimizations.up_to("swiglu"), Optimizations.all()],
    ids=["none", "swiglu", "all"],
)  # fmt: skip
def test_load_and_save_is_bit_identical(
    folder: Path, state: dict[str, torch.Tensor], optimizations: Any, tmp_path: Path
) -> None:
    Qwen2ForCausalLM.from_pretrained(folder, optimizations=optimizations).save_pretrained(tmp_path / "ours")
    before, after = tensors(folder), tensors(tmp_path / "ours")
    assert before.keys() == after.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


@needs_mixture
def test_both_forms_of_a_state_dict_make_the_same_stock_model(state: dict[str, torch.Tensor]) -> None:
    config = small_config(SHAPE)
    first, second = (
        stock_from_state_dict(config, given, dtype=torch.bfloat16).state_dict() for given in (state, stacked(state))
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def edited(folder: Path, change: Any) -> None:
    (path,) = folder.glob("*.safetensors")
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


@needs_mixture
@pytest.mark.parametrize(
    ("name", "rows"),
    [("experts.15.up_proj.weight", None), ("experts.3.down_proj.weight", 7), ("shared_expert_gate.weight", None)],
)
def test_an_expert_s_tensor_that_does_not_fit_is_named(folder: Path, name: str, rows: int | None) -> None:
    full = f"model.layers.1.mlp.{name}"

    def change(found: dict[str, torch.Tensor]) -> None:
        tensor = found.pop(full)
        if rows is not None:
            found[full] = tensor[:rows].clone()

    edited(folder, change)
    with pytest.raises(CheckpointError, match=re.escape(full)):
        Qwen2ForCausalLM.from_pretrained(folder)


@needs_mixture
def test_a_folder_with_fewer_experts_than_its_config_says(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts": 17}))
    with pytest.raises(CheckpointError, match=r"experts\.16\.|mlp\.gate\.weight"):
        Qwen2ForCausalLM.from_pretrained(folder)
