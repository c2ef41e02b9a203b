"""pytest's side of the latency gate: options, parameters, and the hooks that close what would pass in silence.

The root conftest.py loads it. It imports no torch by itself.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.perf import benchmark_json, documented, hookspec
from qwen2_npu.conformance.perf.documented import BASELINES
from qwen2_npu.conformance.perf.measurement import INPUT_TOKENS, OUTPUT_TOKENS
from qwen2_npu.conformance.perf.replay import Replay
from qwen2_npu.conformance.perf.rows import Configuration, Mode, Row, user_rows
from qwen2_npu.conformance.perf.runner import DeviceRunner, Request, Runner
from qwen2_npu.conformance.perf.session import EVERY_ROW, EveryRowWasJudged, GateOptions, LatencyGate
from qwen2_npu.conformance.sizes import SIZES
from qwen2_npu.optimizations import ORIGINAL

GATE = pytest.StashKey[LatencyGate]()
RUNNER = pytest.StashKey[Runner]()

SAVED = ".benchmarks"
"""pytest-benchmark's own folder for saved runs, which the documented tables must never share."""

USER_BATCHES = (1, 4)

RUNS_NO_TEST = {"collectonly": "--collect-only", "setuponly": "--setup-only", "setupplan": "--setup-plan"}


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspec)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qwen2-npu")
    group.addoption(
        "--gate",
        action="store_true",
        help="fail closed: a row that is not measured or not compared fails, as does every skipped test",
    )
    group.addoption(
        "--gate-rows",
        metavar="PATTERN,…",
        default=EVERY_ROW,
        help="the latency rows that count, by row id: 7b-*, *-decode (default: all)",
    )
    group.addoption(
        "--update-baselines",
        metavar="REASON",
        help="record the latencies measured as this machine's baseline; the reason is kept with it",
    )
    group.addoption(
        "--update-graphs",
        metavar="REASON",
        help="record the lowered graphs as they are now in baselines/graphs; the reason is kept with each",
    )
    sizes = [name for name, size in SIZES.items() if size.shards == 1]
    group.addoption(
        "--random-weights", choices=sizes, metavar="SIZE", help=f"measure this size alone: {', '.join(sizes)}"
    )


# ---- configuration ------------------------------------------------------------------------------------------------
@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "perf: measures or gates latency")
    option = config.option
    if option.gate:
        _refuse_with_gate(option)
    for flag, reason in _updates(option).items():
        if reason is not None and not reason.strip():
            raise pytest.UsageError(f"{flag} needs a reason: it is kept with the numbers")
    if option.random_weights and getattr(option, "model_path", None):
        raise pytest.UsageError("--random-weights and --model-path both name the weights: give one")
    if _is_parallel(config) and not option.gate and hasattr(option, "benchmark_disable"):
        option.benchmark_disable = True  # pytest-benchmark would do so, with a warning for every session
    _keep_documented_tables(config)


def _refuse_with_gate(option: Any) -> None:
    for name, flag in RUNS_NO_TEST.items():
        if getattr(option, name, False):
            raise pytest.UsageError(f"--gate with {flag} runs no test")
    for flag, reason in _updates(option).items():
        if reason is not None:
            raise pytest.UsageError(f"--gate judges and {flag} records: give one of them")


def _updates(option: Any) -> dict[str, str | None]:
    """What records, each alone: nobody who records latencies means to bless changed graphs as well."""
    return {"--update-baselines": option.update_baselines, "--update-graphs": option.update_graphs}


def pytest_sessionstart(session: pytest.Session) -> None:
    """What names nothing is refused before tests are collected, in a line.

    After every conftest.py's pytest_configure: the device is known.
    """
    option = session.config.option
    try:
        if getattr(option, "model_path", None) is not None:
            runner_of(session.config).model_name  # noqa: B018  # reads the checkpoint's configuration
        if option.gate_rows != EVERY_ROW:
            gate_of(session.config)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error


def _keep_documented_tables(config: pytest.Config) -> None:
    """Compare with ``baselines/``, save elsewhere: a file saved there would be the next bare compare's, by its name."""
    option = config.option
    if not hasattr(option, "benchmark_storage"):
        return
    stock = option.benchmark_storage in (f"file://./{SAVED}", "")
    if stock and option.benchmark_compare is True:  # a number or a name means a run that was saved
        option.benchmark_storage = f"file://{BASELINES}"
    storage = Path(option.benchmark_storage.removeprefix("file://"))
    if (option.benchmark_save or option.benchmark_autosave) and (storage / benchmark_json.FILE).exists():
        raise pytest.UsageError(
            f"--benchmark-save would write into {storage} beside the documented tables, and the next bare "
            "--benchmark-compare would take it for them: save and compare in two runs, use --benchmark-json=FILE, or "
            f"--benchmark-storage={SAVED} for both"
        )


def _is_parallel(config: pytest.Config) -> bool:
    return (
        hasattr(config, "workerinput") or config.getoption("dist", "no") != "no" or "PYTEST_XDIST_WORKER" in os.environ
    )


def runner_of(config: pytest.Config) -> Runner:
    """The session's runner."""
    if RUNNER not in config.stash:
        config.stash[RUNNER] = config.hook.pytest_qwen2_npu_runner(config=config)
    return config.stash[RUNNER]


@pytest.hookimpl(trylast=True)
def pytest_qwen2_npu_runner(config: pytest.Config) -> Runner:
    option = config.option
    return DeviceRunner(
        Request(
            device=getattr(option, "device", None) or "cpu",
            random_weights=option.random_weights,
            model_path=getattr(option, "model_path", None),
            assume_tp=getattr(option, "assume_tp", None),
            decode_steps=getattr(option, "decode_steps_given", None),
        )
    )


def gate_of(config: pytest.Config) -> LatencyGate:
    """The session's gate."""
    if GATE not in config.stash:
        option = config.option
        options = GateOptions(option.gate, option.gate_rows, option.update_baselines, _is_parallel(config))
        config.stash[GATE] = LatencyGate(
            options,
            runner_of(config),
            _user_rows(config),
            baselines=config.hook.pytest_qwen2_npu_baselines(config=config),
        )
    return config.stash[GATE]


@pytest.hookimpl(trylast=True)
def pytest_qwen2_npu_baselines(config: pytest.Config) -> Path:
    return BASELINES


def _user_rows(config: pytest.Config) -> tuple[Row, ...]:
    """Rows of the model that the user named: its last step, or those of --steps."""
    runner = runner_of(config)
    if (name := runner.model_name) is None:
        return ()
    modes: tuple[Mode, ...] = ("eager", "graph")
    last = runner.size(Configuration(name, 1, 1, "eager", ORIGINAL)).ladder[-1]
    steps = getattr(config.option, "steps", None) or (last,)
    return user_rows(name, USER_BATCHES, modes, steps)


# ---- tests --------------------------------------------------------------------------------------------------------
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row_id" not in metafunc.fixturenames:
        return
    gate = gate_of(metafunc.config)
    parameters = []
    for row in gate.rows.values():
        marks = [pytest.mark.benchmark(timer=Replay(), group=benchmark_json.group(row.configuration.model, row.phase))]
        if row.id not in gate.documented:
            marks.append(pytest.mark.slow)
        parameters.append(pytest.param(row.id, id=row.id, marks=marks))
    metafunc.parametrize("row_id", parameters)


@pytest.fixture(scope="session")
def latency_gate(pytestconfig: pytest.Config) -> LatencyGate:
    """The session's gate: ``latency_gate.check(request.node, row_id, benchmark)``."""
    return gate_of(pytestconfig)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.gate:
        item: EveryRowWasJudged = EveryRowWasJudged.from_parent(
            session, name="every_row_was_judged", nodeid="tests/perf::every_row_was_judged"
        )
        item.gate = gate_of(session.config)
        session.items.append(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report: Any = yield
    if item.config.option.gate and report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        report.outcome = "failed"
        report.longrepr = f"--gate: {item.nodeid} did not run: {reason}"
        if hasattr(report, "wasxfail"):
            del report.wasxfail
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Generator[None, None, None]:
    try:
        yield
    finally:  # after pytest-benchmark's tables, and even where its own comparison raises
        lines = gate_of(config).summary() if GATE in config.stash else []
        if lines:
            terminalreporter.section("latency gate")
        for line in lines:
            terminalreporter.write_line(line)


# ---- pytest-benchmark ---------------------------------------------------------------------------------------------
@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    fingerprint = runner_of(config).fingerprint
    machine_info["qwen2_npu"] = {"fingerprint": fingerprint.name, "identity": dict(fingerprint.identity)}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    if runner_of(config).self_test:
        output_json["self_test"] = True


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Stock compare warns where machines differ, and compares all the same. Here it stops."""
    theirs = compared_benchmark["machine_info"]
    bare = config.option.benchmark_compare is True
    if theirs.get(benchmark_json.MARK):
        _compare_documented(config, benchmarksession, compared_benchmark)
    elif bare and (benchmarksession.storage.path / benchmark_json.FILE).exists():
        raise pytest.UsageError(
            f"a bare --benchmark-compare takes the last file by name, and in {benchmarksession.storage.path} that is "
            f"not {benchmark_json.FILE}: move what was saved there elsewhere, or name the file: "
            "--benchmark-compare=FILE"
        )
    else:
        differing = _machine_differences(theirs, machine_info)
        if differing:
            raise pytest.UsageError(f"--benchmark-compare: saved on another machine ({'; '.join(differing)})")
    # pytest-benchmark's own check compares every field, the clock frequency included, and would warn always.
    compared_benchmark["machine_info"] = machine_info


def _compare_documented(config: pytest.Config, benchmarksession: Any, compared: dict[str, Any]) -> None:
    """On another machine nothing may be compared with the tables; rows are not run there, and this makes sure."""
    from qwen2_npu.conformance.machine import comparable

    conditions = next(iter(gate_of(config).documented.values())).conditions
    foreign = comparable.not_comparable(runner_of(config).fingerprint, conditions.machine)
    if foreign is None:
        _leave_out_what_may_not_be_held(config, benchmarksession, compared)
        return
    if config.option.gate or config.option.benchmark_compare_fail:
        raise pytest.UsageError(f"--benchmark-compare with the documented tables: {foreign}")
    benchmarksession.logger.info(f"documented tables: {foreign}: nothing is compared with them")
    compared["benchmarks"] = []


def _leave_out_what_may_not_be_held(config: pytest.Config, benchmarksession: Any, compared: dict[str, Any]) -> None:
    """Stock comparison goes by names: not by the transformers of the stock model, nor by how long the runs are."""
    installed = str(runner_of(config).fingerprint.identity.get("transformers"))
    asked = getattr(config.option, "decode_steps_given", None)
    steps = OUTPUT_TOKENS - 1 if asked is None else asked
    left_out = {
        number.row.node_id: f"{number.row.id}: {reason}"
        for number in gate_of(config).documented.values()
        if (reason := documented.why_not_row(number, INPUT_TOKENS, steps, installed))
    }
    compared["benchmarks"] = [entry for entry in compared["benchmarks"] if entry["fullname"] not in left_out]
    for line in left_out.values():
        benchmarksession.logger.info(f"compared with nothing documented: {line}")


def _machine_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """By fingerprint where both have one, else by what stock machine_info says of the hardware."""
    if "qwen2_npu" in theirs and "qwen2_npu" in ours:
        there, here = Fingerprint.read(theirs["qwen2_npu"]["identity"]), Fingerprint.read(ours["qwen2_npu"]["identity"])
        return there.differences(here)
    pairs = {name: (theirs.get(name), ours.get(name)) for name in ("node", "system", "machine")}
    for name in ("brand_raw", "count"):
        pairs[name] = (theirs.get("cpu", {}).get(name), ours.get("cpu", {}).get(name))
    return [f"{name}: {there} → {here}" for name, (there, here) in pairs.items() if there != here]
