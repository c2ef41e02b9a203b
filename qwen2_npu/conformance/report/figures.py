"""What a run's charts show: the claims, the documented numbers and the predictions, brought together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen2_npu.conformance.graph import committed
from qwen2_npu.conformance.graph.committed import CommittedGraph
from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE, Hardware
from qwen2_npu.conformance.perf import documented
from qwen2_npu.conformance.perf.documented import Documented
from qwen2_npu.conformance.report.charts import accuracy, kernels, roofline
from qwen2_npu.conformance.report.charts.ladder import LadderMark, ladder
from qwen2_npu.conformance.report.charts.rows import LEFT, RIGHT
from qwen2_npu.conformance.report.charts.sweep import sweep
from qwen2_npu.conformance.report.claims import Claim, Status
from qwen2_npu.conformance.report.inputs import RunInputs, finite
from qwen2_npu.conformance.report.labels import STEPS, labels
from qwen2_npu.conformance.report.latency import is_held
from qwen2_npu.optimizations import LADDER, PHASES

HALF = 500
"""Width of a chart that shares the page with another and with the labels."""

assert HALF > LEFT + RIGHT

MODELS = ("7B", "72B")


@dataclass(frozen=True)
class Labelled:
    """Charts whose rows stand beside labels. ``labels``: step and the guide's name."""

    title: str
    labels: tuple[tuple[str, str], ...]
    svgs: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """Every row that a chart may show.

    Attributes:
        claims: row id -> its claim.
        predicted: row id -> least and most milliseconds.
    """

    claims: Mapping[str, Claim]
    predicted: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, claims: Sequence[Claim], predicted: Mapping[str, tuple[float, float]]) -> Numbers:
        """The latency claims among ``claims``."""
        rows = {claim.id.removeprefix("latency/"): claim for claim in claims if claim.id.startswith("latency/")}
        return cls(rows, predicted)

    def point(self, number: Documented) -> LadderMark:
        """The row, with what was measured only where it may stand beside the documented number."""
        claim = self.claims.get(number.row.id)
        point = LadderMark(number.ms, predicted=self.predicted.get(number.row.id))
        return point if claim is None or not is_held(claim) else _measured(claim, point)

    def other_stock(self, number: Documented) -> tuple[str, LadderMark] | None:
        """What was measured of the stock model of another transformers in place of the row's, under its own name."""
        claim = self.claims.get(number.row.id)
        if claim is None or claim.step == number.row.configuration.step:
            return None
        return claim.step, _measured(claim, LadderMark())


def _measured(claim: Claim, point: LadderMark) -> LadderMark:
    value = None if claim.value is None else claim.value.number
    return replace(point, measured=value, bad=claim.status is Status.FAIL)


def _labels(steps: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((step, labels().get(step, "")) for step in steps)


def ladders(numbers: Numbers) -> list[Labelled]:
    """Prefill and decode of both documented models."""
    made = []
    for model in MODELS:
        rows = [
            n for n in documented.read() if n.row.configuration.model == model and not n.row.table.endswith("-batch")
        ]
        steps = [step for step in STEPS if any(n.row.configuration.step == step for n in rows)]
        others = dict.fromkeys(other[0] for n in rows if (other := numbers.other_stock(n)))
        steps = [*steps[:1], *others, *steps[1:]]  # below the documented one, with no bar of its own
        svgs = []
        for phase in PHASES:
            points: dict[tuple[str, str], LadderMark] = {}
            for n in rows:
                if n.row.phase != phase:
                    continue
                points[n.row.configuration.step, n.row.configuration.mode] = numbers.point(n)
                if other := numbers.other_stock(n):
                    points[other[0], n.row.configuration.mode] = other[1]
            svgs.append(ladder(steps, points, f"{phase}, ms", HALF))
        cards = rows[0].row.configuration.cards
        title = f"{model}, batch 4" + (f", {cards} cards" if cards > 1 else "")
        made.append(Labelled(title, _labels(steps), tuple(svgs)))
    return made


def sweeps(numbers: Numbers) -> list[str]:
    """Four small charts: both models, both phases."""
    made = []
    for model in MODELS:
        for phase in PHASES:
            points = {
                n.row.configuration.batch: numbers.point(n)
                for n in documented.read()
                if n.row.table == f"{model.lower()}-batch" and n.row.phase == phase
            }
            made.append(sweep(points, f"{model} {phase}, ms"))
    return made


@dataclass(frozen=True)
class Share:
    """Of the roof that binds a row. ``measured`` is empty where nothing was."""

    documented: str
    measured: str
    roof: str


@dataclass(frozen=True)
class Roofline:
    """The chart and, row by row, what part of the roof was reached."""

    svg: str
    card: Hardware
    rows: tuple[tuple[str, dict[str, Share]], ...]
    """Configuration, and phase -> its shares."""


def rooflines(numbers: Numbers) -> Roofline:
    """Every row in graph mode whose graph is in ``baselines/graphs``."""
    card = HARDWARE[DOCUMENTED_SOC]
    runs: list[roofline.RooflinePoint] = []
    rows: dict[str, dict[str, Share]] = {}
    for number, graph in _with_graphs():
        measured = numbers.point(number).measured
        sources = {"documented": number.ms} | ({} if measured is None else {"measured": measured})
        own = {
            source: roofline.RooflinePoint(number.row.id, graph.flops, graph.nbytes, ms, source)
            for source, ms in sources.items()
        }
        runs += own.values()
        memory = own["documented"].intensity < card.bf16_peak.value / card.memory_bandwidth.value
        shares = {source: f"{run.share(card):.0%}" for source, run in own.items()}
        what = number.row.configuration
        name = f"{what.model}, batch {what.batch}, {what.step}"
        share = Share(shares["documented"], shares.get("measured", ""), "memory" if memory else "arithmetic")
        rows.setdefault(name, {})[number.row.phase] = share
    return Roofline(roofline.roofline(runs, card), card, tuple(rows.items()))


def _with_graphs() -> Iterator[tuple[Documented, CommittedGraph]]:
    """Documented rows in graph mode and their lowered graphs, on one card."""
    known = {(graph.size, graph.phase, graph.batch, graph.step): graph for graph in committed.graphs()}
    for number in documented.read():
        what = number.row.configuration
        size = what.model if what.cards == 1 else f"{what.model}-tp{what.cards}"
        graph = known.get((size, number.row.phase, what.batch, what.step))
        if graph is not None and what.mode == "graph":
            yield number, graph


def accuracies(inputs: RunInputs) -> list[Labelled]:
    """One pair of charts per verification of the run."""
    made = []
    for title, found in steps(inputs):
        svgs = (accuracy.errors(LADDER, found, HALF), accuracy.mismatches(LADDER, found, HALF))
        made.append(Labelled(title, _labels(LADDER), svgs))
    return made


def steps(inputs: RunInputs) -> list[tuple[str, dict[str, accuracy.AccuracyBar]]]:
    """Title of every verification, and its steps."""
    made = []
    for content in inputs.verifications.values():
        title = (
            f"{content['model']}, {content['dtype']}, {content.get('mode', 'eager')}: "
            f"verified with {content['environment']['verified']}"
        )
        made.append((title, {row["step"]: _step(row) for row in content["rows"]}))
    return made


def _step(row: Mapping[str, Any]) -> accuracy.AccuracyBar:
    unexcused = sum(len(batch["unexcused"]) for batch in row["batches"].values())
    return accuracy.AccuracyBar(
        float(row["rms_ratio"]), int(finite(row["excused"])), unexcused, int(finite(row["positions"]))
    )


@dataclass(frozen=True)
class CensusFigure:
    """The 7B's layers as bars, and every operator of a decode layer as a table."""

    bars: Labelled
    operators: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[tuple[str, str], ...], str], ...]
    """Step, the guide's name, per operator (count, "more", "less" or ""), kernels of the whole graph."""


CENSUS_SIZE, CENSUS_BATCH = "7B", 4


def censuses() -> CensusFigure:
    """Of the committed graphs; the claims say whether a run lowered them to the same."""
    graphs = [g for g in committed.graphs() if (g.size, g.batch) == (CENSUS_SIZE, CENSUS_BATCH)]
    by_phase = {phase: {g.step: g for g in graphs if g.phase == phase} for phase in PHASES}
    steps = [step for step in STEPS if step in by_phase["decode"]]
    svgs = tuple(
        kernels.kernels(
            steps, {step: by_phase[phase][step].layer for step in steps if step in by_phase[phase]},
            f"{phase}: kernels per layer", HALF,
        )
        for phase in PHASES
    )  # fmt: skip
    decode = [by_phase["decode"][step] for step in steps]
    operators = tuple(dict.fromkeys(name for graph in decode for name in graph.layer))
    rows = []
    for index, graph in enumerate(decode):
        before = decode[index - 1].layer if index else graph.layer
        counts = tuple((str(graph.layer.get(name, "")), _change(graph.layer, before, name)) for name in operators)
        rows.append((graph.step, labels().get(graph.step, ""), counts, str(graph.launches)))
    title = f"{CENSUS_SIZE}, batch {CENSUS_BATCH}: kernels of one layer"
    return CensusFigure(Labelled(title, _labels(steps), svgs), operators, tuple(rows))


def _change(now: Mapping[str, int], before: Mapping[str, int], name: str) -> str:
    difference = now.get(name, 0) - before.get(name, 0)
    return "more" if difference > 0 else "less" if difference < 0 else ""
