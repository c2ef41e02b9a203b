"""The C compiler that builds the emulator's libraries."""

from __future__ import annotations

import errno
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qwen2_npu.emulator.settings import EmulatorError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def command() -> list[str]:
    """How to call the C compiler: ``CC`` with its flags, else Python's own compiler, else one of the usual names.

    Raises:
        EmulatorError: there is none, or CC cannot be read.
    """
    text = os.environ.get("CC", "")
    try:
        asked = shlex.split(text)
    except ValueError as error:
        raise EmulatorError(
            f"CC={text!r} cannot be read ({error}): write it as for a shell, with quotes around a path with spaces"
        ) from None
    # Python's own flags belong to the machine that it was built on.
    own = itertools.takewhile(lambda word: not word.startswith("-"), (sysconfig.get_config_var("CC") or "").split())
    candidates = [asked] if asked else [[*own] or ["cc"], ["cc"], ["gcc"], ["clang"]]
    for program, *rest in candidates:
        path = shutil.which(program)
        if path:
            return [path, *rest]
    raise EmulatorError(
        f"no C compiler ({', '.join(dict.fromkeys(words[0] for words in candidates))}): the emulated NPU's libraries "
        "are built once; install one (apt-get install gcc), or name one in CC"
    )


def shared_library(compiler: Sequence[str], sources: Sequence[str], output: Path, flags: Sequence[str] = ()) -> None:
    """Compile ``sources`` into ``output``.

    Args:
        compiler: as ``command`` gives it.
        sources: C files.
        output: the library; files that the compiler needs meanwhile are beside it.
        flags: what follows the sources.

    Raises:
        EmulatorError: the compiler failed, was killed, or cannot be run.
        OSError: the disk is full.
    """
    level = [] if any(word.startswith("-O") for word in compiler) else ["-O2"]
    words = [*compiler, "-std=gnu11", *level, "-fPIC", "-shared", f"-Wl,-soname,{output.name}", *sources, *flags]
    words += ["-o", str(output)]
    # One disk to be full, and messages in one language.
    environment = {**os.environ, "TMPDIR": str(output.parent), "LC_ALL": "C"}
    pipe = subprocess.PIPE
    try:
        done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    except OSError as error:
        raise EmulatorError(
            f"the C compiler {words[0]} cannot be run ({error.strerror or error}): repair it, or name another one in CC"
        ) from error
    if done.returncode or not output.is_file():
        _explain(words, done, output.parent)


def _explain(words: list[str], done: subprocess.CompletedProcess[bytes], folder: Path) -> NoReturn:
    """Raise what a compiler's failure means. One that writes nothing has failed, too."""
    said = done.stderr.decode(errors="replace").strip()
    for line in said.splitlines():
        if any(os.strerror(code) in line for code in DISK_FULL):
            raise OSError(errno.ENOSPC, line.strip(), str(folder))
    call = shlex.join(words)
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        raise EmulatorError(
            f"the C compiler was killed by {name}, as happens where memory is short: "
            f"free some and try again, or name another one in CC: {call}"
        )
    how = f"failed:\n{said[-2000:]}" if said else f"failed with exit status {done.returncode} and no message"
    raise EmulatorError(
        f"the C compiler cannot build the emulator's libraries: repair it, or name another one in CC; {call} {how}"
    )
