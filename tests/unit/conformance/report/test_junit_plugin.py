"""A session's JUnit file says what it was verified on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qwen2_npu.conformance.machine import fingerprint
from qwen2_npu.conformance.machine.provenance import Provenance
from qwen2_npu.conformance.machine.verified import Where
from qwen2_npu.conformance.report import junit


def test_provenance_of_a_session(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n", encoding="utf-8")
    plugin = ("-p", "qwen2_npu.conformance.report.junit_plugin", "-p", "no:cacheprovider")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"--rootdir={tmp_path}",
        *plugin,
        "--junitxml=j.xml",
        "test_one.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    provenance = Provenance.of_properties(junit.read(tmp_path / "j.xml").properties)
    assert provenance.verified.where is Where.CPU
    assert provenance.commit == fingerprint.commit()["commit"]
    assert provenance.identity["device"] == "cpu"
