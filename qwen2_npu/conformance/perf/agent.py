"""The process between the launcher and its ranks: torch's elastic agent, as ``torchrun --standalone`` runs it.

    python -m qwen2_npu.conformance.perf.agent FOLDER LAUNCHER_PID RANKS ARGUMENT…

``ARGUMENT…`` is what Python runs as every rank, which gets the folder and this process's id behind its own arguments.
torchrun itself prints how ranks ended; here it goes to ``failures.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from qwen2_npu.conformance.perf import processes
from qwen2_npu.conformance.perf.job import FAILURES, LOGS
from qwen2_npu.conformance.report import write_text

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
CLOSING_SECONDS = 5
"""From the signal that ends a rank to the one that cannot be refused."""


def main(folder: str, launcher: str, ranks: str, *command: str) -> int:
    """Run the ranks to their end. 0 if every one of them ended with 0."""
    processes.die_with_parent(signal.SIGTERM, int(launcher))
    processes.adopt_orphans()
    before = os.environ.get(AUTOLOAD)
    os.environ[AUTOLOAD] = "0"  # the agent needs no device; its ranks inherit what the user set
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    del os.environ[AUTOLOAD]
    if before is not None:
        os.environ[AUTOLOAD] = before
    (Path(folder) / LOGS).mkdir()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(ranks),
        run_id=Path(folder).name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder) / LOGS), redirects=Std.ALL),
        shutdown_timeout=CLOSING_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-u", *command, folder, os.getpid())
    except ChildFailedError as error:
        ended = [{"rank": rank, "exitcode": failure.exitcode} for rank, failure in error.failures.items()]
        write_text(Path(folder) / FAILURES, json.dumps(ended))
        return 1
    finally:
        processes.end_descendants()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
