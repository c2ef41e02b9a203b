"""The committed graphs, read without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_npu.conformance.graph import baselines, committed
from qwen2_npu.conformance.sizes import SIZES


def test_agrees_with_the_graph_suite_s_own_reader() -> None:
    found = {str(graph): graph for graph in committed.graphs()}
    wanted = {str(graph): graph for graph in baselines.documented()}
    assert found.keys() == wanted.keys()
    for name, graph in wanted.items():
        layered = baselines.load(graph)
        assert layered is not None
        cost = layered.of(SIZES[graph.size].layers).cost
        ours = found[name]
        assert (ours.flops, ours.nbytes, ours.launches) == (cost.flops, cost.nbytes, cost.launches)
        assert ours.layer == layered.layer.operators
        assert ours.layer_kernels == layered.layer.cost.launches


def test_no_folder_no_graphs(tmp_path: Path) -> None:
    assert committed.graphs(tmp_path / "none") == ()


@pytest.mark.parametrize("text", ["{}", '{"graphs": {"nonsense": {}}}', "[1"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "7B.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"7B\.json is damaged"):
        committed.graphs(tmp_path)
