"""``python -m qwen2_npu``: the commands, with this Python. Launchers start it so."""

from __future__ import annotations

from qwen2_npu.cli import main

if __name__ == "__main__":
    main(prog_name="qwen2-npu")
