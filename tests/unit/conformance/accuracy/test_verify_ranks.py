"""`qwen2-npu verify` in two real ranks, launched once: what they do is in verify_ranks.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu import LADDER
from qwen2_npu.checkpoint.quantizing import quantize
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.accuracy.verify import verify
from tests.unit.checkpoint.merges import config_of, guide_merged, weights_of, write_folder
from tests.unit.conformance.accuracy import verify_ranks
from tests.unit.parallel.job import Done
from tests.unit.parallel.job import run as launch

pytestmark = pytest.mark.slow

TIMEOUT = 6
"""Seconds that ranks wait for one another: rank 0 computes by itself for longer."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    folder, config = tmp_path_factory.mktemp("ranks"), config_of(4, 2)
    guide = write_folder(folder / "guide", config, guide_merged(config, weights_of(config), 2))
    (guide / "tokenizer_config.json").unlink()  # random tokens do
    quantize(tiny.path(), folder / "w8a8", scheme="w8a8")
    return launch("torchrun", ["-m", verify_ranks.__name__, str(folder)], folder, timeout=TIMEOUT), folder


@pytest.fixture(scope="module")
def said(job: tuple[Done, Path]) -> list[dict[str, Any]]:
    done, folder = job
    assert all((folder / f"{rank}.json").exists() for rank in range(2)), done.errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("case", "stream"), [("whole", False), ("stream", True)])
def test_the_verdict_is_that_of_one_rank(
    case: str, stream: bool, job: tuple[Done, Path], said: list[dict[str, Any]]
) -> None:
    assert [rank[case]["status"] for rank in said] == [0, 0], said[0][case]["output"]
    ranks, one = json.loads((job[1] / f"{case}.json").read_text()), verify(device="cpu", stream=stream).to_dict()
    assert ranks["passed"]
    assert one["passed"]
    assert ranks.keys() - one.keys() == {"ranks", "left_out"}
    assert (ranks["ranks"], ranks["left_out"]) == (2, "")
    assert [row["step"] for row in ranks["rows"]] == [*LADDER, "mm_all_reduce"]
    for ours, theirs in zip(ranks["rows"], one["rows"], strict=False):
        assert (ours["step"], ours["passed"], ours["positions"]) == (theirs["step"], True, theirs["positions"])
    for name in ("model", "dtype", "reference_dtype", "streamed"):
        assert ranks[name] == one[name]
    assert ranks["perplexity"]["baseline"] == one["perplexity"]["baseline"]
    assert [sample["prompt"] for sample in ranks["samples"]] == [sample["prompt"] for sample in one["samples"]]


def test_8_bit_activations_are_scaled_as_the_ranks_do(job: tuple[Done, Path], said: list[dict[str, Any]]) -> None:
    assert [rank["w8a8"]["status"] for rank in said] == [0, 0], said[0]["w8a8"]["output"]
    found = json.loads((job[1] / "w8a8.json").read_text())
    assert ([row["step"] for row in found["rows"]], found["ranks"], found["scheme"]) == (["w8a8"], 2, "w8a8")
    assert found["passed"]
    assert found["perplexity"]["baseline"] != verify(job[1] / "w8a8", device="cpu", steps=["w8a8"]).perplexity.baseline  # type: ignore[union-attr]
    assert found["cost"]["whole"]["kl"] > 0


@pytest.mark.parametrize("case", ["whole", "stream"])
def test_the_stock_model_is_on_rank_0_alone(case: str, said: list[dict[str, Any]]) -> None:
    assert said[0][case]["stock"] > 1
    assert said[1][case] == {"status": 0, "output": "", "stock": 0}
    assert "2 ranks shared the optimised model; the stock" in " ".join(said[0][case]["output"].split())


def test_a_folder_that_does_not_record_its_layout(job: tuple[Done, Path], said: list[dict[str, Any]]) -> None:
    assert [rank["assumed"]["status"] for rank in said] == [0, 0], said[0]["assumed"]["output"]
    report = json.loads((job[1] / "assumed.json").read_text())
    assert (report["ranks"], [row["passed"] for row in report["rows"]]) == (2, [True])


def test_another_checkpoint_on_one_rank(job: tuple[Done, Path], said: list[dict[str, Any]]) -> None:
    for rank in said:
        assert (rank["another"]["status"], rank["another"]["stock"]) == (2, 0)
        (line,) = rank["another"]["output"].splitlines()
        assert line.startswith("error: rank 1 has model.safetensors other, rank 0 has ")
        assert line.endswith(": put the same checkpoint on every node")
    assert not (job[1] / "another.json").exists()


def test_a_failing_step_is_named_on_rank_0_alone(job: tuple[Done, Path]) -> None:
    done, folder = job
    assert (done.status, done.left) == (1, []), done.errors
    report = json.loads((folder / f"{verify_ranks.FAILING}.json").read_text())
    (row,) = report["rows"]
    assert f"step fused_qkv, {verify_ranks.FAULT} (" in row["explanation"]
    assert done.output.count("FAIL fused_qkv: batch ") == 1
    assert done.output.count("FAILED") == 1
