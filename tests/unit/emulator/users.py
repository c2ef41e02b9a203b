"""Child processes of other users, for tests of what one user may do to another."""

from __future__ import annotations

import json
import os
import sysconfig
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

USER, OTHER = 65533, 65532
"""Numbers of two users: the one who is looked at, and the one who is not trusted."""

FAKE_COMPILER = """#!/bin/sh
for output; do :; done
echo library > "$output"
"""
"""A compiler whose libraries nobody could load: for tests of where they are put, and who may use them."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")


class Answer(NamedTuple):
    """What a function returned as text, or the error that it raised and the type of that."""

    value: str = ""
    error: str = ""
    kind: str = ""


def as_user(
    user: int, function: Callable[[], object], *, group: int | None = None, umask: int = 0o022, **environment: str
) -> Answer:
    """Call ``function`` in a process of ``user``. A fork: this package may be where only root can read it."""
    sysconfig.get_config_vars()  # reads a file of Python's, which the other user may not be able to
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.write(writing, json.dumps(_in_child(user, function, group, umask, environment)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as stream:
        answer = stream.read()
    os.waitpid(process, 0)
    return Answer(*json.loads(answer))


def _in_child(
    user: int, function: Callable[[], object], group: int | None, umask: int, environment: dict[str, str]
) -> Answer:
    try:
        os.chdir("/")
        os.environ.update(environment)
        tempfile.tempdir = None
        os.umask(umask)
        os.setgroups([])
        os.setresgid(*[user if group is None else group] * 3)
        os.setresuid(user, user, user)
        return Answer(str(function()))
    except Exception as error:
        text = "".join(traceback.format_exception(error)) if isinstance(error, AssertionError) else str(error)
        return Answer("", text, type(error).__name__)


def owned(path: Path, user: int, mode: int | None = None, content: str | None = None) -> Path:
    """A folder, or a file where there is ``content``, of ``user``."""
    if content is None:
        path.mkdir(exist_ok=True)
    else:
        path.write_text(content)
    os.chown(path, user, user)
    if mode is not None:
        path.chmod(mode)
    return path
