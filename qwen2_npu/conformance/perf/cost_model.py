"""Predicted latency of a lowered graph on an Ascend card. A prediction, never a measurement; labelled so everywhere.

The counts of ``graphs/cost.py`` over what the card can do (``hardware.py``), times a few efficiencies:

    t(operators of one type) = max(FLOPs / (peak · e_compute), bytes / (bandwidth · e_memory)) + launches · t_launch
    t(graph mode)            = Σ t(types) + collectives
    t(single-op mode)        = max(that, launches · t_host): the host issues every operator by itself
    t(collective)            = t_collective + bytes sent to other cards / (link bandwidth · e_link)

The efficiencies are fitted on the guide's 7B tables, those of the collective on one configuration of the 72B; every
other number of the 72B is held out. ``scripts/fit_cost_model.py`` does it and writes ``baselines/cost_model.json``.

The tables cannot tell launches from bandwidth: 0 to 7 µs fit about as well. A prediction is an interval of such fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from qwen2_npu.conformance.graph import baselines
from qwen2_npu.conformance.graph.census import Census
from qwen2_npu.conformance.graph.cost import ATTENTION, COLLECTIVES, INTEGER_PRODUCTS, PRODUCTS, Cost
from qwen2_npu.conformance.machine.hardware import DOCUMENTED_SOC, HARDWARE, Hardware
from qwen2_npu.conformance.perf.documented import BASELINES, Documented, read
from qwen2_npu.conformance.perf.rows import Configuration, Row
from qwen2_npu.conformance.sizes import SIZES

PARAMETERS = BASELINES / "cost_model.json"

COLLECTIVE_CONFIGURATION = Configuration("72B", cards=8, batch=4, mode="graph", step="fused_qkv")
"""What the collective's two numbers are fitted on. The guide prints it twice, in the ladder and in the batch sweep."""


@dataclass(frozen=True)
class Efficiencies:
    """What the fit found.

    Attributes:
        product, attention: fraction of the peak that matrix products and attention reach; of 8-bit integers, of theirs.
        weights, memory: fraction of the memory bandwidth that products and all other operators reach.
        launch_us: between two kernels of a graph.
        host_us: the host's work per operator in single-op mode.
        collective_us: start of an all-reduce.
        link: fraction of a card's link bandwidth that an all-reduce reaches.

    The three times are those of the documented card; ``hardware.py`` states them with their source.
    """

    product: float
    attention: float
    weights: float
    memory: float
    launch_us: float
    host_us: float
    collective_us: float
    link: float


@dataclass(frozen=True)
class Part:
    """Predicted seconds of one GE operator type, and what bounds it."""

    operator: str
    seconds: float
    launches: int
    bound: str


@dataclass(frozen=True)
class Prediction:
    """A documented row, what the model says of it, whether it was used to fit; ``low``, ``high``: of all fits."""

    documented: Documented
    ms: float
    fitted: bool
    low: float
    high: float

    @property
    def error(self) -> float:
        """Relative: positive where the model is slower than documented."""
        return self.ms / self.documented.ms - 1


def load(path: Path = PARAMETERS) -> Efficiencies:
    """The committed efficiencies."""
    return Efficiencies(**json.loads(path.read_text(encoding="utf-8"))["efficiencies"])


def load_all(path: Path = PARAMETERS) -> list[Efficiencies]:
    """The fit, and one for each launch time that the documented numbers allow."""
    others = json.loads(path.read_text(encoding="utf-8"))["other_launches"]
    return [load(path), *(Efficiencies(**found) for found in others)]


@cache
def census_of(row: Row) -> Census:
    """The full-size graph of a row.

    Raises:
        LookupError: it has no baseline.
    """
    what = row.configuration
    shard = SIZES[what.model].shard(what.cards).name
    found = baselines.at_full_size(baselines.DocumentedGraph(shard, row.phase, what.batch, what.step))
    if found is None:
        raise LookupError(f"{row.id}: no graph of {shard}, batch {what.batch}, {what.step} in {baselines.FOLDER}")
    return found


def parts(census: Census, efficiencies: Efficiencies, hardware: Hardware) -> list[Part]:
    """Predicted time per operator type on one card, collectives aside; the longest first."""
    found = []
    for name, cost in census.costs.items():
        if name in COLLECTIVES:
            continue
        compute, memory = _rates(name, efficiencies, hardware)
        arithmetic, moving = cost.flops / compute, cost.nbytes / memory
        launches = cost.launches * efficiencies.launch_us * 1e-6
        kind = "launch" if launches > max(arithmetic, moving) else "compute" if arithmetic > moving else "memory"
        found.append(Part(name, max(arithmetic, moving) + launches, cost.launches, kind))
    return sorted(found, key=lambda part: -part.seconds)


def _rates(name: str, efficiencies: Efficiencies, hardware: Hardware) -> tuple[float, float]:
    """FLOP/s and bytes/s that operators of a type reach."""
    peak, bandwidth = hardware.bf16_peak.value, hardware.memory_bandwidth.value
    if name in PRODUCTS:
        peak = hardware.int8_peak.value if name in INTEGER_PRODUCTS else peak
        return peak * efficiencies.product, bandwidth * efficiencies.weights
    if name in ATTENTION:
        return peak * efficiencies.attention, bandwidth * efficiencies.memory
    # Vector operators do far fewer FLOPs per byte than the vector cores can: memory bounds them.
    return float("inf"), bandwidth * efficiencies.memory


def collective_seconds(census: Census, efficiencies: Efficiencies, hardware: Hardware) -> float:
    """Of what the cards send each other in one step; nothing on one card.

    Raises:
        ValueError: nothing is known of the card's links.
    """
    sent = sum((cost for name, cost in census.costs.items() if name in COLLECTIVES), Cost())
    if not sent.launches:
        return 0.0
    if hardware.link_bandwidth is None:
        raise ValueError(f"nothing is known of the links of {hardware.soc}: add them to machine/hardware.py")
    links = hardware.link_bandwidth.value * efficiencies.link
    return sent.launches * efficiencies.collective_us * 1e-6 + sent.link_bytes / links


def predict(row: Row, efficiencies: Efficiencies, hardware: Hardware = HARDWARE[DOCUMENTED_SOC]) -> float:
    """Predicted seconds of a documented row."""
    census = census_of(row)
    device = sum(part.seconds for part in parts(census, efficiencies, hardware))
    device += collective_seconds(census, efficiencies, hardware)
    host = 0.0 if row.configuration.mode == "graph" else census.cost.launches * efficiencies.host_us * 1e-6
    return max(device, host)


def is_fitted(row: Row) -> bool:
    """Whether the fit may see the row: decided by what was measured, since tables repeat each other's numbers."""
    return row.configuration.model == "7B" or row.configuration == COLLECTIVE_CONFIGURATION


def predictions(fits: Sequence[Efficiencies] = ()) -> list[Prediction]:
    """Every documented row, in the guide's order, by the first of the fits; the others widen its interval."""
    known, made = fits or load_all(), []
    for number in read():
        found = [predict(number.row, efficiencies) * 1e3 for efficiencies in known]
        made.append(Prediction(number, found[0], is_fitted(number.row), min(found), max(found)))
    return made


def interval(values: Iterable[float], digits: int = 1) -> str:
    """``24.6 to 26.1``, or one number where both are printed alike."""
    found = sorted(values)
    low, high = (f"{value:.{digits}f}" for value in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"


def to_json(efficiencies: Efficiencies, others: Sequence[Efficiencies]) -> dict[str, object]:
    """What ``baselines/cost_model.json`` holds: the efficiencies, and how they came about."""
    made = predictions([efficiencies])
    held_out = [abs(p.error) for p in made if not p.fitted]
    fitted = [abs(p.error) for p in made if p.fitted]
    return {
        "what": "efficiencies of the cost model; predictions, not measurements",
        "soc": DOCUMENTED_SOC,
        "fitted_on": f"the guide's 7B tables; collectives: {COLLECTIVE_CONFIGURATION}",
        "mean_error_fitted": sum(fitted) / len(fitted),
        "mean_error_held_out": sum(held_out) / len(held_out),
        "efficiencies": asdict(efficiencies),
        "other_launches": [asdict(found) for found in others],
    }
