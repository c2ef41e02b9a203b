"""``qwen2-npu verify`` on a checkpoint that cannot be compared; what it does with others is in test_cli.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from click.testing import CliRunner

from qwen2_npu.cli import main
from qwen2_npu.conformance import tiny


def test_one_line_and_no_report(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.path(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 1}))
    report = tmp_path / "verify.json"
    result = CliRunner().invoke(main, ["verify", "--model-path", str(folder), "--json", str(report)])
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {folder} does not fit its configuration: ")
    assert "mlp.down_proj.weight has shape" in lines[0] or "mlp.gate_proj.weight has shape" in lines[0]
    assert not report.exists()
