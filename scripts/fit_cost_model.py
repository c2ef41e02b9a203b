"""Fits the cost model's efficiencies on the documented 7B tables, and the collective's on one 72B configuration.

    pip install scipy && python scripts/fit_cost_model.py

Writes baselines/cost_model.json, and docs/predictions.md: every documented row beside its prediction. Where the fit
changes a time (``*_us``), copy it to qwen2_npu/conformance/machine/hardware.py: a test holds the two together.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from qwen2_npu.conformance.files import write_json
from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC
from qwen2_npu.conformance.perf import cost_model
from qwen2_npu.conformance.perf.cost_model import Efficiencies
from qwen2_npu.conformance.perf.documented import read

PAGE = Path(__file__).parents[1] / "docs" / "predictions.md"

START = Efficiencies(
    product=0.6, attention=0.3, weights=0.8, memory=0.6, launch_us=5.0, host_us=30.0, collective_us=30.0,
    link=0.15,
)  # fmt: skip
BOUNDS = {"product": 1.0, "attention": 1.0, "weights": 1.0, "memory": 1.0, "link": 1.0}
"""No efficiency exceeds the hardware."""

NOTHING = 1e-6

COLLECTIVE = ("collective_us", "link")


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


def main() -> None:
    """Fit and write."""
    on_one_card = tuple(field.name for field in fields(Efficiencies) if field.name not in COLLECTIVE)
    efficiencies = fit(START, on_one_card, "7B")
    efficiencies = fit(efficiencies, COLLECTIVE, "72B")
    rounded = Efficiencies(**{name: _rounded(value) for name, value in asdict(efficiencies).items()})
    write_json(cost_model.PARAMETERS, cost_model.to_json(rounded))
    PAGE.write_text(markdown(rounded), encoding="utf-8")
    print(f"wrote {cost_model.PARAMETERS} and {PAGE}")


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

| table | label | batch | mode | phase | documented ms | predicted ms | error | |
|---|---|---|---|---|---|---|---|---|
"""


def markdown(efficiencies: Efficiencies) -> str:
    """Every documented row, misses included."""
    made = cost_model.predictions(efficiencies)
    head = HEAD.format(
        soc=DOCUMENTED_SOC,
        collective=cost_model.COLLECTIVE_CONFIGURATION,
        fitted=_errors("fitted", [abs(p.error) for p in made if p.fitted]),
        held_out=_errors("held out", [abs(p.error) for p in made if not p.fitted]),
        efficiencies=textwrap.fill(
            f"Efficiencies: {', '.join(f'{name} {value:g}' for name, value in asdict(efficiencies).items())}.", 120
        ),
    )
    return head + "".join(f"| {' | '.join(_cells(p))} |\n" for p in made)


def _errors(kind: str, errors: list[float]) -> str:
    return f"{kind}: {len(errors)} rows, mean |error| {sum(errors) / len(errors):.1%}, worst {max(errors):.0%}"


def _cells(p: cost_model.Prediction) -> list[str]:
    row, what = p.documented.row, p.documented.row.configuration
    place = [row.table, f"{p.documented.label} `{what.step}`", str(what.batch), what.mode, row.phase]
    return [*place, f"{p.documented.ms:.0f}", f"{p.ms:.1f}", f"{p.error:+.0%}", "fitted" if p.fitted else "held out"]


if __name__ == "__main__":
    main()
