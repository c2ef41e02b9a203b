"""What `qwen2-npu bench` measured: claims without a limit, and a table of each file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2_npu.conformance.machine.provenance import Provenance
from qwen2_npu.conformance.machine.verified import Verified
from qwen2_npu.conformance.perf.rows import weights_of
from qwen2_npu.conformance.report.claims import Claim, Status, Value, plain_number
from qwen2_npu.conformance.report.inputs import RunInputs, finite
from qwen2_npu.conformance.report.labels import labels
from qwen2_npu.optimizations import ORIGINAL

AREA = "Bench"

NOT_GATED = "measured by `qwen2-npu bench`, which only measures; `pytest tests/perf` compares with limits"

Result = Mapping[str, Any]


def claims(inputs: RunInputs) -> list[Claim]:
    """One per result and phase."""
    return [
        claim for content in inputs.benches.values() for result in content["results"] for claim in _of(content, result)
    ]


def _of(content: Mapping[str, Any], result: Result) -> Iterator[Claim]:
    verified = Provenance.from_json(content["provenance"]).verified
    problems = [*result["faults"], *result["warnings"]]
    for phase, ms in (("prefill", result["prefill_ms"]), ("decode", result["decode"]["mean"])):
        cards = f"-tp{result['cards']}" if result.get("cards", 1) > 1 else ""
        name = "-".join(str(result[key]) for key in ("model", "dtype", "mode", "step"))
        name += f"{cards}-b{result['batch']}-{phase}"
        yield Claim(
            id=f"bench/{name}",
            area=AREA,
            title=f"{_model(result)}, batch {result['batch']}, {result['mode']}, {result['step']}: {phase}",
            status=Status.FAIL if result["faults"] else Status.NOT_COMPARABLE,
            step=result["step"],
            label=labels().get(result["step"], ""),
            subject=_what([result]),
            verified=verified,
            value=Value(finite(ms), "ms"),
            message="\n".join(problems) or NOT_GATED,
        )


def _model(result: Result) -> str:
    """Files of before there were several cards do not say how many."""
    cards = result.get("cards", 1)
    return f"{result['model']} on {cards} cards" if cards > 1 else str(result["model"])


def _what(results: Sequence[Result]) -> str:
    first = results[0]
    weights = weights_of(first["weights"], first["dtype"], [result["step"] for result in results])
    return f"{weights}, {first['dtype']}, {first['input_tokens']} tokens + {first['decode_steps']} steps"


@dataclass(frozen=True)
class Table:
    """One bench file. ``rows``: step, the guide's name, and a cell per heading."""

    title: str
    verified: Verified
    headings: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]


COLUMNS = (
    "batch", "prefill ms", f"× {ORIGINAL}", "decode ms", f"× {ORIGINAL}", "median", "p99", "tokens/s", "memory roof",
    "compute roof", "peak GB", "guide's prefill", "guide's decode",
)  # fmt: skip


def tables(inputs: RunInputs) -> list[Table]:
    """One per file; columns in which nothing stands are left out."""
    made = []
    for name, content in inputs.benches.items():
        results = content["results"]
        cells = [_cells(result, _base(result, results)) for result in results]
        used = [index for index in range(len(COLUMNS)) if any(row[index] for row in cells)]
        rows = tuple(
            (result["step"], labels().get(result["step"], ""), tuple(row[index] or "–" for index in used))
            for result, row in zip(results, cells, strict=True)
        )
        first = results[0]
        title = f"{name}: {_model(first)}, {_what(results)}, {first['mode']}"
        verified = Provenance.from_json(content["provenance"]).verified
        made.append(Table(title, verified, tuple(COLUMNS[index] for index in used), rows))
    return made


def _base(result: Result, results: list[Result]) -> Result | None:
    """The stock model at the same batch, in the same file."""
    return next((r for r in results if r["step"] == ORIGINAL and r["batch"] == result["batch"]), None)


def _cells(result: Result, base: Result | None) -> tuple[str, ...]:
    decode = result["decode"]

    def times(now: float, then: float | None) -> str:
        return "" if then is None else f"{then / now:.2f}"

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    def number(value: float | None) -> str:
        return "" if value is None else plain_number(value)

    peak = result["peak_bytes"]
    return (
        str(result["batch"]),
        number(result["prefill_ms"]),
        times(result["prefill_ms"], None if base is None else base["prefill_ms"]),
        number(decode["mean"]),
        times(decode["mean"], None if base is None else base["decode"]["mean"]),
        number(decode["median"]),
        number(decode["p99"]),
        number(result["tokens_per_second"]),
        share(result["decode_memory_share"]),
        share(result["prefill_compute_share"]),
        "" if peak is None else f"{peak / 1e9:.2f}",
        number(result["documented_prefill_ms"]),
        number(result["documented_decode_ms"]),
    )
