"""Baselines of graphs: a change in either direction fails, readably, until it is recorded with a reason."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.graph.baselines import DocumentedGraph
from qwen2_npu.conformance.graph.census import Census, LayeredCensus
from qwen2_npu.conformance.graph.cost import Cost
from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import LADDER, Optimizations

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


def test_at_full_size_the_last_layer_of_a_prefill_reads_the_experts_of_one_token_per_row(tmp_path):
    """Four rows of 1024 tokens: 64 experts in 27 layers, 26.5 of at most 32 in the last."""
    _, prefill = MIXTURE_PHASES
    layer, last = (Census(9, {"GroupedMatmul": Cost(weight_bytes=nbytes, launches=2)}, {}) for nbytes in (6400, 3200))
    baselines.update(prefill, LayeredCensus(last, layer, 0, unlike=1), "first record", tmp_path)
    found = baselines.at_full_size(prefill, tmp_path).costs["GroupedMatmul"]
    assert found == Cost(weight_bytes=round(27 * 6400 + 3200 * 64 * (1 - (7 / 8) ** 4) / 32), launches=56)


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
    assert len(names) == len(set(names)) == 6 * 2 * 11 + 2 * 2 * (5 + 1) + 3 + 2 * (2 + 2 + 5) + 2 + 3 * 2 * 2 + 3


# ---- what is lowered ------------------------------------------------------------------------------------------------
def test_the_protocol_is_the_guide_s():
    conditions = documented.read()[0].conditions
    assert conditions.input_tokens == baselines.PROMPT
    assert conditions.input_tokens + conditions.output_tokens == baselines.CAPACITY
    # Decode steps see 1024 to 2046 tokens before them; 1535 is the mean.
    assert baselines.PAST == (1024 + 2046) // 2 == 1535
    assert baselines.BATCH == 4


def test_the_sweeps_are_those_of_the_tables():
    tables = {"7b-batch": "7B", "72b-batch": "72B-tp8"}
    rows = [number.row for number in documented.read() if number.row.table in tables]
    assert {row.configuration.step for row in rows} == {baselines.SWEEP_STEP}
    for table, size in tables.items():
        batches = {row.configuration.batch for row in rows if row.table == table}
        assert {*baselines.SWEEPS[size], baselines.BATCH} == batches
        assert baselines.BATCH not in baselines.SWEEPS[size]


def test_graphs_of_every_size_phase_step_and_batch():
    found = set(baselines.documented())
    assert baselines.MIXTURES == {"57B-A14B": (1,), "57B-A14B-tp2": (1,), "57B-A14B-tp4": (1, 8, 16, 32)}
    assert {graph.size for graph in found} == {*baselines.GRAPH_SIZES, *baselines.MIXTURES}
    for size, batches in baselines.MIXTURES.items():
        for phase in ("prefill", "decode"):
            reduced = {(4, "mm_all_reduce")} if "tp" in size and phase == "prefill" else set()
            theirs = {(graph.batch, graph.step) for graph in found if (graph.size, graph.phase) == (size, phase)}
            assert theirs == {(batch, "fused_moe") for batch in (4, *batches)} | reduced
    for size in baselines.GRAPH_SIZES:
        for phase in ("prefill", "decode"):
            steps = {graph.step for graph in found if (graph.size, graph.phase, graph.batch) == (size, phase, 4)}
            wanted = {*LADDER}
            if size in ("7B", "72B-tp8"):
                wanted.add("original")
            if "tp" in size and phase == "prefill":
                wanted |= {"mm_all_reduce"}
            if size in ("0.5B", "7B", "72B-tp8"):
                wanted |= {"w8a16", "w8a8"}
            assert steps == wanted, (size, phase)
            swept = {(graph.batch, graph.step) for graph in found if (graph.size, graph.phase) == (size, phase)}
            others = {(b, "fused_qkv") for b in baselines.SWEEPS.get(size, ())}
            if (size, phase) == ("7B", "decode"):  # for predictions of 8-bit weights, and what they are compared with
                others |= {(1, step) for step in (LADDER[-1], "w8a16", "w8a8")}
            assert {each for each in swept if each[0] != 4} == others


@pytest.mark.parametrize(("phase", "prompt"), [("prefill", 1024), ("decode", 1535)])
@pytest.mark.parametrize("step", ["original", "fused_qkv"])
def test_a_graph_is_lowered_as_its_name_says(monkeypatch, phase, prompt, step):
    calls = []
    monkeypatch.setattr(baselines, "lower_size", lambda *args, **kwargs: calls.append((args, kwargs)) or len(calls))
    monkeypatch.setattr(baselines, "of_layers", lambda few, more: (few, more))
    graph = DocumentedGraph("7B", phase, 8, step)
    assert graph.lowered() == 1
    assert graph.census() == (2, 3)
    switches = Optimizations.none() if step == "original" else Optimizations.up_to("fused_qkv")
    assert [args for args, _ in calls] == [(SIZES["7B"], phase, 8, switches)] * 3
    assert [kwargs for _, kwargs in calls] == [
        {"prompt": prompt, "capacity": 2048, "layers": layers} for layers in (None, 2, 4)
    ]


def test_every_reason_is_kept_beside_a_new_one(tmp_path):
    folder = tmp_path / "new" / "folder"
    graphs = [replace(GRAPH, batch=batch) for batch in (1, 8, 16)]
    for graph in graphs:
        baselines.update(graph, layered(), "first record", folder)
    for graph, reason in zip(graphs, ("a", "b", "c"), strict=True):
        baselines.update(graph, layered(13), reason, folder)
    content = json.loads((folder / "7B.json").read_text())
    assert {key: why["reason"] for key, why in content["changed"].items()} == {
        graph.key: reason for graph, reason in zip(graphs, "abc", strict=True)
    }
    assert content["reason"] == "first record"
    assert list(content["graphs"]) == sorted(content["graphs"])
    assert all(set(why["versions"]) == {"torch", "torch_npu", "transformers"} for why in content["changed"].values())
    assert baselines.load(graphs[0], folder) == layered(13)
    assert baselines.load(replace(GRAPH, size="0.5B"), folder) is None


@pytest.mark.parametrize("part", ["outside", "layer"])
@pytest.mark.parametrize("name", [field.name for field in fields(Cost)])
@pytest.mark.parametrize("by", [1, -1])
def test_every_number_is_held_in_both_directions(tmp_path, part, name, by):
    census = Census(7, {"MatMul": Cost(10, 11, 12, 13, 14, 15)}, {"Reshape": 3})
    whole = LayeredCensus(census, census, 99)
    baselines.update(GRAPH, whole, "first record", tmp_path)
    assert baselines.verdict(GRAPH, whole, tmp_path) == ""
    cost = census.costs["MatMul"]
    changed = replace(census, costs={"MatMul": replace(cost, **{name: getattr(cost, name) + by})})
    assert f'"{name}": {getattr(cost, name) + by}' in baselines.verdict(
        GRAPH, replace(whole, **{part: changed}), tmp_path
    )


@pytest.mark.parametrize("by", [1, -1])
def test_peaks_nodes_and_views_are_held_too(tmp_path, by):
    census = Census(7, {"MatMul": Cost(launches=1)}, {"Reshape": 3})
    whole = LayeredCensus(census, census, 99)
    baselines.update(GRAPH, whole, "first record", tmp_path)
    for changed in (
        replace(whole, peak_activation_bytes=99 + by),
        replace(whole, outside=replace(census, nodes=7 + by)),
        replace(whole, layer=replace(census, views={"Reshape": 3 + by})),
        replace(whole, layer=replace(census, views={})),
        replace(whole, layer=replace(census, costs={})),
        replace(whole, layer=replace(census, costs={**census.costs, "Add": Cost(launches=1)})),
    ):
        assert "is not what its baseline says" in baselines.verdict(GRAPH, changed, tmp_path)
