"""Fits the cost model's efficiencies on the documented 7B tables, and the collective's on one 72B configuration.

    pip install scipy && python scripts/fit_cost_model.py

Writes baselines/cost_model.json, and docs/predictions.md: every documented row beside its prediction. Where the fit
changes a time (``*_us``), copy it to qwen2_npu/conformance/machine/hardware.py: a test holds the two together.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import click
import numpy as np
from scipy.optimize import least_squares

from qwen2_npu.conformance.files import write_json
from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.graph.census import Census
from qwen2_npu.conformance.graph.cost import ATTENTION
from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE
from qwen2_npu.conformance.perf import cost_model
from qwen2_npu.conformance.perf.cost_model import Efficiencies, interval
from qwen2_npu.conformance.perf.documented import read
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import LADDER

PAGE = Path(__file__).parents[1] / "docs" / "predictions.md"

START = Efficiencies(
    product=0.6, attention=0.3, weights=0.8, memory=0.6, launch_us=5.0, host_us=30.0, collective_us=30.0,
    link=0.15,
)  # fmt: skip
BOUNDS = {"product": 1.0, "attention": 1.0, "weights": 1.0, "memory": 1.0, "link": 1.0}
"""No efficiency exceeds the hardware."""

NOTHING = 1e-6

COLLECTIVE = ("collective_us", "link")

LAUNCHES_US = (1.0, 3.0, 5.0, 7.0)
"""What a launch may take, beside the fit's own time. 7 µs bounds what others measured on newer cards, host included."""


def fit(start: Efficiencies, names: tuple[str, ...], model: str) -> Efficiencies:
    """Least squares of log(predicted / documented) over the rows of ``model`` that the fit may see."""
    numbers = [n for n in read() if n.row.configuration.model == model and cost_model.is_fitted(n.row)]
    documented = np.log([number.ms / 1e3 for number in numbers])

    def with_values(logs: np.ndarray) -> Efficiencies:
        return replace(start, **{name: float(np.exp(value)) for name, value in zip(names, logs, strict=True)})

    def residuals(logs: np.ndarray) -> np.ndarray:
        efficiencies = with_values(logs)
        return np.log([cost_model.predict(number.row, efficiencies) for number in numbers]) - documented

    first = np.log([getattr(start, name) for name in names])
    upper = np.log([BOUNDS.get(name, 1e6) for name in names])
    # soft_l1: a row that the model cannot explain should not bend the others.
    found = least_squares(
        residuals, np.minimum(first, upper - 1e-6), bounds=(-np.inf, upper), loss="soft_l1", f_scale=0.1
    )
    return with_values(found.x)


def fit_all(launch_us: float | None = None) -> Efficiencies:
    """Both fits, in four digits.

    Args:
        launch_us: the time of a launch; None to fit it, too.
    """
    left_out = COLLECTIVE if launch_us is None else (*COLLECTIVE, "launch_us")
    start = START if launch_us is None else replace(START, launch_us=launch_us)
    found = fit(start, tuple(field.name for field in fields(Efficiencies) if field.name not in left_out), "7B")
    found = fit(found, COLLECTIVE, "72B")
    return Efficiencies(**{name: _rounded(value) for name, value in asdict(found).items()})


@click.command()
@click.option("--json", "parameters", type=click.Path(path_type=Path), default=cost_model.PARAMETERS)
@click.option("--page", type=click.Path(path_type=Path), default=PAGE)
def main(parameters: Path, page: Path) -> None:
    """Fit and write."""
    fits = [fit_all(), *map(fit_all, LAUNCHES_US)]
    write_json(parameters, cost_model.to_json(fits[0], fits[1:]))
    page.write_text(markdown(fits), encoding="utf-8")
    print(f"wrote {parameters} and {page}")


def _rounded(value: float) -> float:
    """Four digits; what the fit drives to nothing is nothing."""
    return 0.0 if value < NOTHING else float(f"{value:.4g}")


HEAD = """\
# Predicted against documented

Written by `python scripts/fit_cost_model.py`. **Predictions** of the cost model
(`qwen2_npu/conformance/perf/cost_model.py`) from the lowered graphs in `baselines/graphs/`, for an {soc}; the
documented numbers are the guide's, on an Atlas 800I A2. Nothing here was measured by this project. Fitted: the 7B
tables, and for the collective one configuration of the 72B
({collective}), which stands in two tables; all other 72B rows
are held out.

- {fitted}
- {held_out}

{efficiencies}

The tables cannot tell the time of a launch from bandwidth. Fits with other launch times, and their errors:

{fits}

So a prediction is an interval, the last column below: the least and the most of these fits.

## What would speed decode up next

{size}, batch 4, one decode step with every step of the ladder on: **{base} ms** predicted. What a change
would save at most, over the same fits:

| change | saves, ms | why |
|---|---|---|
{ranking}

## Every documented row

| table | label | batch | mode | phase | documented ms | predicted ms | error | | interval, ms |
|---|---|---|---|---|---|---|---|---|---|
"""


def decode_of(size: str) -> Census:
    """The decode step of a size with every step on."""
    layered = baselines.load(baselines.DocumentedGraph(size, "decode", baselines.BATCH, LADDER[-1]))
    assert layered is not None
    return layered.of(SIZES[size].layers)


def milliseconds(census: Census, efficiencies: Efficiencies) -> float:
    """Predicted, collectives aside."""
    return 1e3 * sum(part.seconds for part in _parts(census, efficiencies))


def halved_weights(census: Census) -> Census:
    """Weights of half as many bytes."""
    costs = {name: replace(cost, weight_bytes=cost.weight_bytes // 2) for name, cost in census.costs.items()}
    return replace(census, costs=costs)


DECODED = "7B"

SAVINGS: tuple[tuple[str, str, Callable[[Census, Census, Efficiencies], float]], ...] = (
    (
        "weights in 8 bits",
        "decode reads every weight once per step",
        lambda one, _, fit: milliseconds(one, fit) - milliseconds(halved_weights(one), fit),
    ),
    (
        "products at 90 % of the bandwidth",
        "all are plain MatMul since kv_scatter; NZ for float weights was given up by others after measuring",
        lambda one, _, fit: milliseconds(one, fit) - milliseconds(one, replace(fit, weights=max(fit.weights, 0.9))),
    ),
    (
        "launches in no time",
        "11 kernels per layer are left of the 14 before one_rotary and kv_scatter; nothing where a launch is free",
        lambda one, _, fit: one.cost.launches * fit.launch_us / 1e3,
    ),
    (
        "attention over the cache in no time",
        "1,536 live tokens per row; at batch 48 it is the largest rest",
        lambda one, _, fit: 1e3 * sum(p.seconds for p in _parts(one, fit) if p.operator in ATTENTION),
    ),
    (
        "72B on 8 cards: collectives in no time",
        "overlap; one operator for a product and its all-reduce is documented for prefill alone",
        lambda _, shard, fit: 1e3 * cost_model.collective_seconds(shard, fit, HARDWARE[DOCUMENTED_SOC]),
    ),
)
"""Change, why, and what it saves of the step on one card, or of the 72B's on eight."""


def ranking(fits: Sequence[Efficiencies]) -> list[str]:
    """Rows of the table, the largest first."""
    one, shard = decode_of(DECODED), decode_of("72B-tp8")
    rows = [(name, [saved(one, shard, fit) for fit in fits], why) for name, why, saved in SAVINGS]
    rows.sort(key=lambda row: -max(row[1]))
    return [f"| {name} | {interval(saved)} | {why} |" for name, saved, why in rows]


def markdown(fits: Sequence[Efficiencies]) -> str:
    """Every documented row, misses included."""
    efficiencies, made = fits[0], cost_model.predictions(fits)
    head = HEAD.format(
        fits="\n".join(_fit_line(found) for found in fits),
        size=DECODED,
        base=interval(milliseconds(decode_of(DECODED), found) for found in fits),
        ranking="\n".join(ranking(fits)),
        soc=DOCUMENTED_SOC,
        collective=cost_model.COLLECTIVE_CONFIGURATION,
        fitted=_errors("fitted", [abs(p.error) for p in made if p.fitted]),
        held_out=_errors("held out", [abs(p.error) for p in made if not p.fitted]),
        efficiencies=textwrap.fill(
            f"Efficiencies: {', '.join(f'{name} {value:g}' for name, value in asdict(efficiencies).items())}.", 120
        ),
    )
    return head + "".join(f"| {' | '.join(_cells(p))} |\n" for p in made)


def _parts(census: Census, efficiencies: Efficiencies) -> list[cost_model.Part]:
    return cost_model.parts(census, efficiencies, HARDWARE[DOCUMENTED_SOC])


def _fit_line(efficiencies: Efficiencies) -> str:
    """One fit, in short."""
    made = cost_model.predictions([efficiencies])
    means = [
        sum(errors) / len(errors)
        for fitted in (True, False)
        if (errors := [abs(p.error) for p in made if p.fitted is fitted])
    ]
    return (
        f"- launch {efficiencies.launch_us:g} µs: fitted {means[0]:.1%}, held out {means[1]:.1%}; weights at "
        f"{efficiencies.weights:.2f} of the bandwidth, collective {efficiencies.collective_us:.1f} µs"
    )


def _errors(kind: str, errors: list[float]) -> str:
    return f"{kind}: {len(errors)} rows, mean |error| {sum(errors) / len(errors):.1%}, worst {max(errors):.0%}"


def _cells(p: cost_model.Prediction) -> list[str]:
    row, what = p.documented.row, p.documented.row.configuration
    place = [row.table, f"{p.documented.label} `{what.step}`", str(what.batch), what.mode, row.phase]
    return [
        *place,
        f"{p.documented.ms:.0f}",
        f"{p.ms:.1f}",
        f"{p.error:+.0%}",
        "fitted" if p.fitted else "held out",
        interval((p.low, p.high)),
    ]


if __name__ == "__main__":
    main()
