"""Fits the cost model's efficiencies on the documented 7B tables, and the collective's on one 72B row.

    pip install scipy && python scripts/fit_cost_model.py

Writes baselines/cost_model.json; prints every documented row beside its prediction.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from qwen2_npu.conformance import cost_model
from qwen2_npu.conformance.cost_model import Efficiencies
from qwen2_npu.conformance.perf.documented import read
from qwen2_npu.conformance.report import write_json

START = Efficiencies(
    product=0.6, attention=0.3, weights=0.8, memory=0.6, launch_us=5.0, host_us=30.0, collective_us=30.0,
    collective_gbs=50.0,
)  # fmt: skip
BOUNDS = {"product": 1.0, "attention": 1.0, "weights": 1.0, "memory": 1.0}
"""No efficiency exceeds the hardware."""

COLLECTIVE = ("collective_us", "collective_gbs")


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
    """Fit, write, show."""
    on_one_card = tuple(field.name for field in fields(Efficiencies) if field.name not in COLLECTIVE)
    efficiencies = fit(START, on_one_card, "7B")
    efficiencies = fit(efficiencies, COLLECTIVE, "72B")
    rounded = Efficiencies(**{name: float(f"{value:.4g}") for name, value in asdict(efficiencies).items()})
    write_json(cost_model.PARAMETERS, cost_model.to_json(rounded))
    show(rounded)


def show(efficiencies: Efficiencies) -> None:
    """Every row; fitted ones are marked."""
    table = Table(title=f"Predicted, not measured: {efficiencies}")
    for heading in ("row", "documented ms", "predicted ms", "error", ""):
        table.add_column(heading, justify="right" if "ms" in heading or heading == "error" else "left")
    for p in cost_model.predictions(efficiencies):
        used = "fitted" if p.fitted else "held out"
        table.add_row(p.documented.row.id, f"{p.documented.ms:.0f}", f"{p.ms:.1f}", f"{p.error:+.0%}", used)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
