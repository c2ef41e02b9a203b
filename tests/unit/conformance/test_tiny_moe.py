"""The tiny mixture of experts: its size, its layout, that all experts serve, and that it is worth comparing."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint.sources import open_checkpoint
from qwen2_npu.checkpoint.tokenizer import load_tokenizer
from qwen2_npu.cli import main
from qwen2_npu.compat import IS_V4, is_sparse
from qwen2_npu.conformance import tiny, tiny_moe
from qwen2_npu.conformance.accuracy import text
from qwen2_npu.conformance.accuracy.batches import Batch
from qwen2_npu.conformance.accuracy.verify import _steps, verify
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.optimizations import EXPERTS, LADDER

LARGEST_BYTES = 6_000_000
HIGHEST_HELDOUT_LOSS = 0.90  # as of the dense one
LEAST_SHARE = 0.01
"""Of the choices of a layer, for every expert: an even share is 1/8."""
TOKENS = 1024

needs_torch_npu = pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="needs torch_npu")
needs_mixture = pytest.mark.skipif(IS_V4, reason="transformers 4.37.0 has no Qwen2Moe")


@pytest.fixture(scope="module")
def model() -> Any:
    return Qwen2ForCausalLM.from_pretrained(tiny_moe.path()).eval()


@pytest.fixture(scope="module")
def heldout(model: Any) -> tuple[Any, Any]:
    """Losses of the first held-out tokens, and the experts that served them, (layers, 1, tokens, k)."""
    ids = load_tokenizer(tiny_moe.path())(tiny.heldout_text())["input_ids"][:TOKENS]
    losses, chosen = text.losses_and_experts(model, [ids])
    return losses, chosen[0]


def test_folder_is_small_enough_and_its_texts_are_the_dense_one_s() -> None:
    files = [file for file in tiny_moe.path().iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LARGEST_BYTES
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tiny_moe.path() / name).read_bytes() == (tiny.path() / name).read_bytes()


def test_helper_needs_no_torch() -> None:
    code = (
        "import sys; from qwen2_npu.conformance import tiny_moe; assert tiny_moe.path().is_dir();"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_are_bfloat16_one_tensor_per_expert() -> None:
    with safe_open(tiny_moe.path() / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {str(file.get_tensor(name).dtype) for name in names} == {"torch.bfloat16"}
        assert all(bool(file.get_tensor(name).isfinite().all()) for name in names)
    for layer in range(4):
        assert (f"model.layers.{layer}.mlp.experts.7.up_proj.weight" in names) == (layer > 0)
        assert (f"model.layers.{layer}.mlp.up_proj.weight" in names) == (layer == 0)


@needs_mixture
def test_config_is_of_the_kind_of_the_published_one() -> None:
    """One layer is dense besides, which the published model has not."""
    config = open_checkpoint(tiny_moe.path()).config
    assert [is_sparse(config, layer) for layer in range(4)] == [False, True, True, True]
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (8, 2, False)
    assert config.shared_expert_intermediate_size


@pytest.mark.skipif(not IS_V4, reason="later ones have it")
def test_transformers_without_such_a_model_refuses_it() -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=r"transformers 4\.37\.0 has no such model"):
        verify(tiny_moe.path())


@needs_mixture
def test_every_expert_serves_the_held_out_text(heldout: tuple[Any, Any]) -> None:
    chosen = torch.from_numpy(heldout[1])
    for layer in chosen:
        share = layer.flatten().bincount(minlength=8) / layer.numel()
        assert len(share) == 8
        assert share.min() >= LEAST_SHARE, share


@needs_mixture
def test_it_predicts_the_held_out_text_as_well_as_the_dense_one(heldout: tuple[Any, Any]) -> None:
    assert heldout[0].mean() <= HIGHEST_HELDOUT_LOSS < math.log(2048) / 8


@needs_mixture
def test_greedy_text_is_sensible(model: Any) -> None:
    tokenizer = load_tokenizer(tiny_moe.path())
    prompts = [tiny.prompts()[number] for number in (0, 4, 5, 6)]
    batch = Batch.of([tokenizer(prompt)["input_ids"] for prompt in prompts], pad_token_id=tokenizer.pad_token_id)
    rows = text.greedy(model, batch, max_new_tokens=28, eos_token_ids=[2045, 2047], pad_token_id=2045)
    story, counted, capital, chinese = (tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    assert counted.startswith(" five, six, seven")
    assert capital.strip() == "Paris."
    assert story.count(".") + story.count("!") >= 3  # sentences
    assert '"Help!" cried' in story
    assert sum("\u4e00" <= character <= "\u9fff" for character in chinese) > 20
    assert "喊道" in chinese


# ---- compared -------------------------------------------------------------------------------------------------------
@needs_mixture
@pytest.mark.slow
@pytest.mark.slow_in_ci
def test_verify_passes_with_the_operators_of_experts_and_shows_their_choices(tmp_path: Path) -> None:
    report = tmp_path / "verify.json"
    options = ["--model-path", str(tiny_moe.path()), "--device", "cpu", "--steps", "fused_moe", "--json", str(report)]
    done = CliRunner().invoke(main, ["verify", *options])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(report.read_text())["rows"]
    experts = row["experts"]
    assert experts["agreements"] + experts["excused"] == experts["choices"]
    # Three layers have experts; hidden states and a prefill with the last logits alone route all prompts again, but for
    # the last layer of the latter, which has one token per row.
    prompts, decoded, rows = (
        sum(batch["paths"][path]["positions"] for batch in row["batches"].values())
        for path in ("prefill", "decode", "last_token")
    )
    assert experts["choices"] == 3 * (2 * prompts + decoded) + 2 * prompts + rows
    assert experts["left_out"] == 0
    _, table = done.output.split("Experts that the routers would choose")
    assert ["fused_moe", *map(str, experts.values())] in [line.split() for line in table.splitlines()]


@needs_mixture
@pytest.mark.parametrize(
    ("asked", "mode", "steps"),
    [
        (None, "eager", (*LADDER, *EXPERTS)),
        (None, "torchair", EXPERTS),
        (None, "inductor", EXPERTS),
        (["swiglu"], "eager", ["swiglu"]),
        (["fused_moe"], "torchair", ["fused_moe"]),
    ],
)
def test_the_steps_of_a_mixture(asked: Any, mode: str, steps: Any) -> None:
    assert _steps(asked, tiny_moe.path(), "cpu", "auto", mode=mode) == (steps, "")


@needs_mixture
@pytest.mark.parametrize(
    ("path", "asked", "mode", "message"),
    [
        (tiny_moe.path(), ["swiglu", "fused_moe"], "torchair", "--steps swiglu,fused_moe --mode torchair: without"),
        (None, ["fused_moe"], "eager", "fused_moe is a step of a mixture of experts, and the tiny checkpoint is none"),
        (tiny.path(), ["swiglu", "fused_moe"], "eager", f"and {tiny.path()} is none; leave it out"),
    ],
)
def test_steps_that_a_model_or_a_graph_cannot_have(path: Any, asked: Any, mode: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        _steps(asked, path, "cpu", "auto", mode=mode)


@needs_mixture
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "layer by layer"])
def test_verify_passes_over_the_ladder(stream: bool, dtype: str) -> None:
    result = verify(tiny_moe.path(), dtype=dtype, stream=stream)
    assert result.passed, result.failures
    assert [row.step for row in result.rows] == [*LADDER, *EXPERTS]


@needs_mixture
@needs_torch_npu
@pytest.mark.slow
@pytest.mark.parametrize("stream", ["--no-stream", "--stream"])
@pytest.mark.parametrize("mode", ["eager", "torchair"])
def test_verify_passes_on_an_emulated_npu(mode: str, stream: str, tmp_path: Path) -> None:
    command = ["verify", "--model-path", str(tiny_moe.path()), "--device", "emulated", "--mode", mode, stream]
    command += ["--json", str(tmp_path / "verify.json")]
    done = subprocess.run([sys.executable, "-m", "qwen2_npu", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "verify.json").read_text())
    steps = [row["step"] for row in report["rows"]]
    assert steps == ([*LADDER, *EXPERTS] if mode == "eager" else [*EXPERTS])
    left_out = sum(row["experts"]["left_out"] for row in report["rows"])
    assert (left_out > 0) == (mode == "torchair")
