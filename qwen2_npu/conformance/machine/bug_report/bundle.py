"""One archive for a bug report. Whatever breaks while it is made is written into it, not raised."""

from __future__ import annotations

import json
import os
import traceback
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.files import plain, replacing
from qwen2_npu.conformance.machine.bug_report import logs
from qwen2_npu.conformance.machine.bug_report.redaction import Redaction, variables
from qwen2_npu.conformance.machine.environment import Environment
from qwen2_npu.conformance.machine.provenance import Provenance

README = """\
Made by `qwen2-npu doctor --bundle`. Read it before you attach it to a bug report.

environment.json   versions, device, and the environment variables on a fixed list; no other variable is read
provenance.json    commit and fingerprint: what moves a latency on this machine
doctor.txt         what `qwen2-npu doctor` shows
operators.json     the operator catalogue on the device: every sample, its largest error, and its part of the allowed
probes.json        open questions about the operators, and what this device does
versions/, logs/   version files of driver, firmware and CANN; errors and warnings of CANN's newest logs
problems.txt       what could not be found out, with its traceback

"verified" says what computed the results: a real NPU, the emulated one (the CPU), or portable kernels.
The home folder is written as ~; names of the user and the host, network addresses in logs, and values of anything named
like a secret are taken out.
"""

BundlePart = Callable[[], Iterable[tuple[str, Any]]]
"""Files of the archive: name and content, a text or plain values that become JSON."""

Progress = Callable[[str, int, int], None]


def write(
    path: Path,
    device: str,
    findings: str,
    progress: Progress = lambda label, done, total: None,
    parts: Sequence[BundlePart] | None = None,
    redaction: Redaction | None = None,
) -> list[str]:
    """Write the archive, whole or not at all.

    Args:
        findings: what the doctor shows.
        parts: default: :func:`parts_of`.

    Returns:
        The names of its files.

    Raises:
        OSError: naming ``path``, and what to do.
    """
    clean = redaction or Redaction.of_machine()
    files: dict[str, Any] = {"README.txt": README, "doctor.txt": findings}
    problems = []
    for part in parts_of(device, progress) if parts is None else parts:
        try:
            files.update(part())
        except Exception:  # a broken installation is what this archive is for
            problems.append(traceback.format_exc())
    if problems:
        files["problems.txt"] = "\n".join(problems)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, _written(name, content, clean))
    return list(files)


def parts_of(device: str, progress: Progress = lambda label, done, total: None) -> tuple[BundlePart, ...]:
    """All parts. The cheap ones come first: what an operator can break is written before."""
    return (
        logs.versions,
        logs.commands,
        logs.cann,
        lambda: [("environment.json", _environment(device))],
        lambda: [("provenance.json", Provenance.of_device(device).to_json())],
        lambda: [("operators.json", _operators(device, progress))],
        lambda: [("probes.json", _probes(device))],
    )


def _written(name: str, content: Any, clean: Redaction) -> str:
    """The content as text, redacted before it becomes JSON, which a replacement could break."""
    if isinstance(content, str):
        in_a_log = name.startswith("logs/") or name == "problems.txt"
        return clean.log(content) if in_a_log else clean.text(content)
    return json.dumps(clean.values(plain(content)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _environment(device: str) -> dict[str, Any]:
    return {**Environment.of(device).to_json(), "variables": variables(os.environ)}


def _operators(device: str, progress: Progress) -> dict[str, Any]:
    from qwen2_npu.conformance.machine.bug_report import catalogue
    from qwen2_npu.conformance.machine.verified import Verified

    results = catalogue.run(device, progress=progress)
    return {
        "verified": Verified.on(device).text,
        "totals": catalogue.totals(results),
        "samples": [asdict(result) | {"passed": result.passed} for result in results],
    }


def _probes(device: str) -> dict[str, Any]:
    from qwen2_npu.conformance.machine.bug_report import probes
    from qwen2_npu.conformance.machine.bug_report.device_probes import QUESTIONS
    from qwen2_npu.conformance.machine.verified import Verified

    verified = Verified.on(device)
    return {"verified": verified.text, "answers": probes.run(QUESTIONS, device, verified.where)}
