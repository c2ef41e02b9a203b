"""Baselines of graphs: a change in either direction fails, readably, until it is recorded with a reason."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.graph.baselines import DocumentedGraph
from qwen2_npu.conformance.graph.census import Census, LayeredCensus
from qwen2_npu.conformance.graph.cost import Cost

MIXTURE = DocumentedGraph("57B-A14B", "decode", 4, "fused_moe")

GRAPH = DocumentedGraph("7B", "decode", 4, "swiglu")


MIXTURE_PHASES = (MIXTURE, replace(MIXTURE, phase="prefill"))


def layered(launches: int = 14) -> LayeredCensus:
    layer = Census(48, {"MatMul": Cost(launches=launches)}, {})
    return LayeredCensus(replace(layer, nodes=5), layer, 1000)


def test_what_was_recorded_is_found_and_passes(tmp_path):
    baselines.update(GRAPH, layered(), "first record", tmp_path)
    assert baselines.load(GRAPH, tmp_path) == layered()
    assert baselines.verdict(GRAPH, layered(), tmp_path) == ""
    content = json.loads((tmp_path / "7B.json").read_text())
    assert content["reason"] == "first record"
    assert content["versions"]["torch"].startswith("2.")


@pytest.mark.parametrize("launches", [13, 15])
def test_a_change_in_either_direction_fails_with_a_diff(tmp_path, launches):
    baselines.update(GRAPH, layered(), "first record", tmp_path)
    problem = baselines.verdict(GRAPH, layered(launches), tmp_path)
    assert "--update-graphs=REASON" in problem
    changed = [line.split() for line in problem.splitlines() if line[:1] in "+-" and "launches" in line]
    assert ["-", '"launches":', "14"] in changed
    assert ["+", '"launches":', str(launches)] in changed


def test_at_full_size_a_mixture_reads_the_experts_to_be_expected(tmp_path):
    grouped, router = Cost(weight_bytes=3200, activation_bytes=5, launches=2), Cost(weight_bytes=7, launches=1)
    layer = Census(9, {"GroupedMatmul": grouped, "MatMul": router}, {})
    for graph in MIXTURE_PHASES:
        baselines.update(graph, LayeredCensus(Census(1, {}, {}), layer, 0), "first record", tmp_path)
    decode, prefill = (baselines.at_full_size(graph, tmp_path).costs for graph in MIXTURE_PHASES)
    assert prefill == {"GroupedMatmul": grouped.combined(grouped, lambda one, _: 28 * one), "MatMul": decode["MatMul"]}
    expected = round(28 * 3200 * 64 * (1 - (7 / 8) ** 4) / 32)
    assert decode["GroupedMatmul"] == replace(prefill["GroupedMatmul"], weight_bytes=expected)
    assert baselines.at_full_size(replace(MIXTURE, batch=5), tmp_path) is None


def test_a_missing_baseline_fails_and_names_the_way_out(tmp_path):
    assert "7B-decode-b4-swiglu has no baseline" in baselines.verdict(GRAPH, layered(), tmp_path)


def test_the_reason_changes_only_with_the_numbers(tmp_path):
    baselines.update(GRAPH, layered(), "first record", tmp_path)
    baselines.update(GRAPH, layered(), "nothing new", tmp_path)
    assert json.loads((tmp_path / "7B.json").read_text())["reason"] == "first record"


def test_each_graph_keeps_its_own_reason_and_versions(tmp_path, monkeypatch):
    other, third = replace(GRAPH, batch=1), replace(GRAPH, batch=8)
    for graph in (GRAPH, other, third):
        baselines.update(graph, layered(), "first record", tmp_path)
    assert json.loads((tmp_path / "7B.json").read_text())["changed"] == {}  # all of one kind: said once
    before = {graph: baselines.provenance(graph, tmp_path) for graph in (GRAPH, third)}
    monkeypatch.setattr(baselines, "package_version", lambda name: "3.0.0")
    baselines.update(other, layered(13), "torch 3 fuses a cast", tmp_path)
    assert {graph: baselines.provenance(graph, tmp_path) for graph in before} == before
    mine = "recorded for 'torch 3 fuses a cast' with torch 3.0.0, torch_npu 3.0.0, transformers 3.0.0"
    assert baselines.provenance(other, tmp_path) == mine
    assert mine in baselines.verdict(other, layered(15), tmp_path)
    assert "'first record'" in baselines.verdict(GRAPH, layered(15), tmp_path)


def test_a_graph_that_is_as_it_was_has_the_first_reason_again(tmp_path):
    baselines.update(GRAPH, layered(), "first record", tmp_path)
    baselines.update(GRAPH, layered(13), "a fault", tmp_path)
    baselines.update(GRAPH, layered(), "first record", tmp_path)
    assert json.loads((tmp_path / "7B.json").read_text())["changed"] == {}


def test_every_graph_is_documented_once():
    names = [str(graph) for graph in baselines.documented()]
    assert len(names) == len(set(names)) == 6 * 2 * 8 + 2 * 2 * (5 + 1) + 3 + 2 * (2 + 2 + 5) + 2
