"""The cost model: what it may be fitted on, what it predicts for every documented row, and what it says of itself."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace

import pytest

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.graph.census import Census
from qwen2_npu.conformance.graph.cost import Cost
from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf import cost_model, lower_bound
from qwen2_npu.conformance.perf.cost_model import Efficiencies
from qwen2_npu.conformance.perf.documented import read
from qwen2_npu.conformance.perf.rows import Configuration, Row
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import LADDER, PHASES, QUANTIZED

CARD = HARDWARE[DOCUMENTED_SOC]
PERFECT = Efficiencies(1, 1, 1, 1, launch_us=0, host_us=0, collective_us=10, link=1)


@pytest.fixture(scope="module")
def made():
    return cost_model.predictions()


def test_every_documented_row_has_a_prediction(made):
    assert [p.documented for p in made] == list(read())
    assert len(made) == 76


def test_the_72b_is_held_out_but_for_one_configuration(made):
    fitted = [p.documented.row for p in made if p.fitted]
    assert [row.id for row in fitted if row.configuration.model == "72B"] == [
        "72b-ladder-b4-graph-fused_qkv-prefill",
        "72b-ladder-b4-graph-fused_qkv-decode",
        "72b-batch-b4-graph-fused_qkv-prefill",
        "72b-batch-b4-graph-fused_qkv-decode",
    ]
    assert sum(row.configuration.model == "7B" for row in fitted) == 36


def test_no_number_is_both_fitted_and_held_out(made):
    """The guide prints some configurations in two tables; what was fitted in one is not held out in the other."""
    fitted, held_out = (
        {(p.documented.row.configuration, p.documented.row.phase) for p in made if p.fitted is seen}
        for seen in (True, False)
    )
    assert fitted
    assert held_out
    assert not fitted & held_out


def test_the_committed_errors_are_those_of_the_committed_efficiencies(made):
    committed = json.loads(cost_model.PARAMETERS.read_text())
    assert committed == cost_model.to_json(cost_model.load(), cost_model.load_all()[1:])
    assert committed["mean_error_fitted"] < 0.10


def test_no_efficiency_exceeds_the_hardware():
    found = cost_model.load()
    assert all(0 < value <= 1 for value in (found.product, found.attention, found.weights, found.memory, found.link))


def test_the_cards_overheads_are_those_of_the_fit():
    """hardware.py states them beside the card's other figures; a new fit has to be copied there."""
    found = cost_model.load()
    stated = {
        "launch_us": CARD.launch_overhead,
        "host_us": CARD.host_overhead,
        "collective_us": CARD.collective_overhead,
    }
    for name, figure in stated.items():
        assert figure is not None
        assert (figure.unit, figure.certainty) == ("s", "fitted")
        assert figure.value * 1e6 == pytest.approx(getattr(found, name), rel=1e-9), f"{name}: copy the fit's"


def test_what_bounds_an_operator():
    costs = {
        "MatMul": Cost(flops=int(280e12), weight_bytes=1, launches=1),
        "Add": Cost(flops=1, activation_bytes=int(0.8e12), launches=1),
        "Cast": Cost(activation_bytes=1, launches=1),
    }
    found = {
        part.operator: part for part in cost_model.parts(Census(0, costs, {}), replace(PERFECT, launch_us=1), CARD)
    }
    assert found["MatMul"].bound == "compute"
    assert found["MatMul"].seconds == pytest.approx(1 + 1e-6)
    assert found["Add"].bound == "memory"
    assert found["Add"].seconds == pytest.approx(1 + 1e-6)
    assert found["Cast"].bound == "launch"


def of_size(size: str) -> Census:
    """The decode graph of a size at batch 4 with every step on."""
    layered = baselines.load(baselines.DocumentedGraph(size, "decode", 4, LADDER[-1]))
    assert layered is not None
    return layered.of(SIZES[size].layers)


def test_a_ring_moves_each_byte_nearly_twice_over_the_links():
    shard = SIZES["72B-tp8"]
    slow = replace(PERFECT, link=0.25)
    census = of_size("72B-tp8")
    nbytes = 4 * shard.hidden * 2
    logits = 4 * SIZES["72B"].vocab * 2
    sums = 2 * shard.layers + 1
    assert CARD.link_bandwidth is not None
    sent = sums * 2 * 7 / 8 * nbytes + 7 / 8 * logits
    expected = (sums + 1) * 10e-6 + sent / (CARD.link_bandwidth.value / 4)
    assert cost_model.collective_seconds(census, slow, CARD) == pytest.approx(expected)
    assert cost_model.collective_seconds(of_size("7B"), slow, CARD) == 0


def test_a_card_whose_links_are_not_known_has_no_collective():
    unknown = replace(CARD, link_bandwidth=None)
    with pytest.raises(ValueError, match="nothing is known of the links of Ascend910B4"):
        cost_model.collective_seconds(of_size("72B-tp8"), PERFECT, unknown)
    assert cost_model.collective_seconds(of_size("7B"), PERFECT, unknown) == 0


def test_single_op_mode_waits_for_the_host():
    row = next(n.row for n in read() if n.row.id == "7b-ladder-b4-eager-original-decode")
    slow = replace(PERFECT, host_us=1000)
    assert cost_model.predict(row, slow) == pytest.approx(cost_model.census_of(row).cost.launches * 1e-3)


def test_predictions_stay_above_the_floor(made):
    """A prediction below what the hardware can do would be a fault of the counts."""
    for p in made:
        perfect = replace(PERFECT, collective_us=0)
        assert p.ms >= cost_model.predict(p.documented.row, perfect) * 1e3 * (1 - 1e-9)


def test_the_page_is_the_committed_models():
    page = (cost_model.BASELINES.parent / "docs" / "predictions.md").read_text(encoding="utf-8")
    for p in cost_model.predictions():
        label = "fitted" if p.fitted else "held out"
        ends = [f"{end:.1f}" for end in (p.low, p.high)]
        interval = ends[0] if ends[0] == ends[1] else " to ".join(ends)
        assert f"| {p.documented.ms:.0f} | {p.ms:.1f} | {p.error:+.0%} | {label} | {interval} |" in page


def test_predictions_are_intervals_over_launches_of_0_to_7_us(made):
    """What the documented numbers leave open: every fit meets them about as well as the best."""
    fits = cost_model.load_all()
    assert [found.launch_us for found in fits] == [0, 1, 3, 5, 7]
    for p in made:
        found = [cost_model.predict(p.documented.row, efficiencies) * 1e3 for efficiencies in fits]
        assert (p.ms, p.low, p.high) == (found[0], min(found), max(found))
    assert any(p.high > 1.1 * p.low for p in made)
    for efficiencies in fits:
        errors = [abs(p.error) for p in cost_model.predictions([efficiencies]) if p.fitted]
        assert sum(errors) / len(errors) < 0.07


def test_the_published_ranking_is_the_committed_models():
    """Its numbers stand in performance.md, too."""
    docs = cost_model.BASELINES.parent / "docs"
    page, summary = (
        " ".join((docs / name).read_text(encoding="utf-8").split()) for name in ("predictions.md", "performance.md")
    )
    one, card = of_size("7B"), CARD
    steps, bits = [], []
    for found in cost_model.load_all():
        parts = cost_model.parts(one, found, card)
        steps.append(1e3 * sum(part.seconds for part in parts))
        halves = {name: replace(cost, weight_bytes=cost.weight_bytes // 2) for name, cost in one.costs.items()}
        bits.append(steps[-1] - 1e3 * sum(p.seconds for p in cost_model.parts(replace(one, costs=halves), found, card)))
    step, saved = (f"{min(found):.1f} to {max(found):.1f}" for found in (steps, bits))
    assert f"**{step} ms**" in page
    assert f"the {step} ms of a 7B step" in summary
    assert f"| weights in 8 bits | {saved} |" in page
    assert f"bits would save {saved}" in summary


def test_the_published_errors_are_the_committed_models(made):
    """On the page of predictions, and where performance.md sums it up."""
    docs = cost_model.BASELINES.parent / "docs"
    page, summary = ((docs / name).read_text(encoding="utf-8") for name in ("predictions.md", "performance.md"))
    for label, fitted in (("fitted", True), ("held out", False)):
        errors = [abs(p.error) for p in made if p.fitted is fitted]
        mean = sum(errors) / len(errors)
        assert f"- {label}: {len(errors)} rows, mean |error| {mean:.1%}, worst {max(errors):.0%}\n" in page
        assert f"{mean:.1%}".replace("%", " %") in summary


# ---- 8-bit weights --------------------------------------------------------------------------------------------------
def test_products_of_integers_have_a_peak_of_their_own():
    cost = Cost(flops=int(560e12), weight_bytes=1, launches=1)
    census = Census(0, {"QuantBatchMatmulV3": cost, "WeightQuantBatchMatmulV2": cost}, {})
    found = {part.operator: part.seconds for part in cost_model.parts(census, replace(PERFECT, product=0.5), CARD)}
    assert found == {"QuantBatchMatmulV3": pytest.approx(2), "WeightQuantBatchMatmulV2": pytest.approx(4)}


@pytest.mark.parametrize(("model", "cards"), [("7B", 1), ("72B", 8)])
@pytest.mark.parametrize("phase", PHASES)
def test_8_bit_weights_are_predicted_above_their_floor(model, cards, phase):
    tokens = baselines.PROMPT if phase == "prefill" else baselines.PAST
    for step in (LADDER[-1], *QUANTIZED):
        row = Row("predicted", Configuration(model, cards, 4, "graph", step), phase)
        floor = lower_bound.work(SIZES[model], phase, 4, tokens, cards, step=step).floor_ms(CARD)
        assert all(floor < cost_model.predict(row, found) * 1e3 for found in cost_model.load_all())


def test_the_published_predictions_of_8_bit_weights_are_the_committed_models():
    root = cost_model.BASELINES.parent
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    script = runpy.run_path(str(root / "scripts" / "predict_quantized.py"))
    lines = list(script["lines"]())
    assert len(lines) == len(script["CASES"])
    assert [line for line in lines if line not in page] == []
