"""What the doctor says of mismatched versions, the emulated device and compilers; and its bundle."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from qwen2_npu import compat, emulator
from qwen2_npu.cli import doctor, main
from qwen2_npu.conformance.machine.bug_report import bundle
from qwen2_npu.conformance.report import own_files
from qwen2_npu.emulator import compiler, environment
from qwen2_npu.emulator.settings import VARIABLE, Settings

ROOT = Path(doctor.__file__).parents[2]


def findings() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.findings()}


@pytest.mark.parametrize(
    ("cann", "torch_npu", "expected"),
    [
        ("8.2.RC1", "2.9.0", "older than the CANN 8.5 of torch_npu 2.9"),
        ("8.5.0", "2.9.0.post1", ""),
        ("8.5.0", "2.13.0", "older than the CANN 9.0 of torch_npu 2.10"),
        ("9.1.0", "2.13.0", ""),
        ("8.5.0", None, ""),
        ("8.5.0", "2.1.0", ""),
        ("unknown", "2.13.0", ""),
    ],
)
def test_cann_and_torch_npu(cann: str, torch_npu: str | None, expected: str) -> None:
    assert doctor.cann_advice(cann, torch_npu).startswith(expected)
    assert bool(doctor.cann_advice(cann, torch_npu)) == bool(expected)


def test_torch_and_torch_npu_of_different_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "torch_npu": "2.9.0"}
    monkeypatch.setattr(doctor, "package_version", versions.get)
    advice = {finding.what: finding.advice for finding in doctor._packages()}
    assert advice["torch_npu"] == "does not match torch 2.13.0+cpu: install the same release of both"
    versions["torch_npu"] = "2.13.0.post2"
    assert not {finding.what: finding.advice for finding in doctor._packages()}["torch_npu"]


def test_protobuf_is_asked_for_where_torchair_is(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0", "torch_npu": "2.13.0"}
    monkeypatch.setattr(doctor, "package_version", versions.get)
    missing = {finding.what: finding for finding in doctor._packages()}["protobuf"]
    assert missing == ("protobuf", "missing", "torchair needs it: pip install protobuf")
    versions["protobuf"] = "7.36.2"
    assert {finding.what: finding for finding in doctor._packages()}["protobuf"] == ("protobuf", "7.36.2", "")
    del versions["torch_npu"]
    assert "protobuf" not in {finding.what for finding in doctor._packages()}


def test_a_transformers_that_is_not_served_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", {"transformers": "4.57.6"}.get)

    def refuse(name: str) -> None:
        compat.check_version("4.57.6")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    assert "pip install transformers==5.24.0" in doctor._transformers().advice
    monkeypatch.setattr(doctor, "package_version", {}.get)
    assert doctor._transformers() == ("transformers", "missing", "pip install transformers==5.24.0")


@pytest.mark.parametrize(
    ("version", "breaks", "state", "advice"),
    [
        (None, False, "not installed", "only to launch several ranks: DS_BUILD_OPS=0 pip install deepspeed==0.19.8"),
        ("0.19.8", False, "0.19.8", ""),
        ("0.17.0", False, "0.17.0", ""),
        ("0.16.9", False, "0.16.9", "0.17 to 0.x are served: DS_BUILD_OPS=0 pip install deepspeed==0.19.8"),
        ("1.0.0", False, "1.0.0", "0.17 to 0.x are served: DS_BUILD_OPS=0 pip install deepspeed==0.19.8"),
        ("0.19.8", True, "0.19.8, cannot be imported: no CANN", "DS_BUILD_OPS=0 pip install deepspeed==0.19.8"),
    ],
)
def test_deepspeed(monkeypatch: pytest.MonkeyPatch, version: str | None, breaks: bool, state: str, advice: str) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: version)

    def load(name: str) -> None:
        assert name == "deepspeed"
        if breaks:
            raise RuntimeError("no CANN\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    assert doctor._deepspeed() == ("deepspeed", state, advice)


def test_the_extra_of_deepspeed_is_what_the_doctor_serves() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    oldest = ".".join(map(str, doctor.OLDEST_DEEPSPEED))
    assert extras["deepspeed"] == [f"deepspeed>={oldest},<1"]
    tested = doctor.INSTALL_DEEPSPEED.split()[-1]
    assert f"emulated: {tested}" in (ROOT / "tox.ini").read_text()


def test_the_emulated_device_is_called_emulated() -> None:
    found = findings()
    if emulator.is_active():
        assert found["npu"].state.startswith("EMULATED: 8 × Ascend910B4")
        assert found["emulator"].state.startswith("active: 8 × Ascend910B4, 32 GiB each")
    else:
        assert "EMULATED" not in found["npu"].state
        assert not found["emulator"].state.startswith("active")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("announced", [True, False])
def test_that_plain_python_cannot_import_torch_is_said(
    monkeypatch: pytest.MonkeyPatch, installed: bool, real: bool, announced: bool
) -> None:
    monkeypatch.setattr(doctor, "package_version", {"torch_npu": "2.13.0"}.get if installed else {}.get)
    monkeypatch.setattr(environment, "signs_of_npu", lambda: ["/dev/davinci_manager"] if real else [])
    monkeypatch.setattr(environment, "announced", lambda: Settings() if announced else None)
    monkeypatch.setattr(emulator, "is_active", lambda: announced)
    found = list(doctor._plain_python())
    assert bool(found) is (installed and not real and not announced)
    for finding in found:
        assert finding.state == "cannot `import torch`: torch_npu is installed and CANN is not"
        assert "`import qwen2_npu` before torch" in finding.advice


@pytest.mark.skipif(not emulator.is_active(), reason="there are no emulated cards here")
def test_the_doctor_of_a_plain_python_names_its_state() -> None:
    names = ("PYTHONPATH", VARIABLE)
    clean = {name: value for name, value in os.environ.items() if name not in names} | {"PYTHONPATH": str(ROOT)}
    code = "from qwen2_npu.cli import doctor\nprint(next(doctor._plain_python()).state)"
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.stdout.startswith("cannot `import torch`"), done.stderr


@pytest.fixture
def inactive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with torch_npu where the emulator is not active."""
    monkeypatch.setattr(emulator, "is_active", lambda: False)
    monkeypatch.setattr(doctor, "package_version", lambda name: "2.13.0")


@pytest.mark.usefixtures("inactive")
@pytest.mark.parametrize("text", ["no-such-compiler", "no-such-compiler -O2", 'cc "-O2'])
def test_a_missing_compiler_is_said_as_the_emulator_says_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CC", text)
    with pytest.raises(emulator.EmulatorError) as caught:
        compiler.command()
    assert doctor._emulator() == ("emulator", "not active; no C compiler", str(caught.value))
    assert ("apt-get install gcc" in doctor._emulator().advice) != ('"' in text)


@pytest.mark.usefixtures("inactive")
@pytest.mark.parametrize("words", [[], ["-O2"], ["gcc", "-DTEXT=two words"]])
def test_the_compiler_is_shown_with_its_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    path = tmp_path / "cc"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    text = shlex.join([str(path), *words])
    monkeypatch.setenv("CC", text)
    assert compiler.command() == [str(path), *words]
    assert doctor._emulator().state.endswith(f"C compiler {text}")
    assert not doctor._emulator().advice


def test_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = {"verified": "cpu (portable kernels)", "totals": {"npu_x": {"passed": 3, "failed": 1, "skipped": 0}}}
    monkeypatch.setattr(bundle, "parts_of", lambda device, progress: [lambda: [("operators.json", operators)]])
    path = tmp_path / "b.zip"
    result = CliRunner().invoke(main, ["doctor", "--bundle", str(path), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "operators on cpu (portable kernels): 3 passed, 1 failed, 0 skipped" in " ".join(result.output.split())
    with zipfile.ZipFile(path) as archive:
        assert archive.read("doctor.txt").decode().startswith("python: 3")


def test_a_bundle_again_after_a_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays that night's, or the next one would be refused."""
    monkeypatch.setattr(bundle, "parts_of", lambda device, progress: [])
    path = tmp_path / "doctor.zip"
    with own_files.locked(tmp_path) as own:
        own.start([path.name])
        path.write_text("of the night", encoding="utf-8")
        own.finish()
    assert CliRunner().invoke(main, ["doctor", "--bundle", str(path), "--device", "cpu"]).exit_code == 0
    with own_files.locked(tmp_path) as own:
        own.start([path.name])
    assert not path.exists()


def test_a_bundle_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "write", lambda *arguments, **named: pytest.fail("the operators ran"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = CliRunner().invoke(main, ["doctor", "--bundle", str(tmp_path / "file" / "bundle.zip")])
    assert result.exit_code == 2
    assert "error: " in result.output
    assert "bundle.zip cannot be written" in result.output
