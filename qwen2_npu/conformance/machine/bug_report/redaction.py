"""What may leave the machine: variables on a list, and texts without the names of people, hosts and networks."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_npu.conformance.machine.fingerprint import SETTINGS

VARIABLES = (
    *SETTINGS,
    "ASCEND_GLOBAL_LOG_LEVEL",
    "ASCEND_HOME_PATH",
    "ASCEND_RT_VISIBLE_DEVICES",
    "DYNAMIC_COMPILE",
    "EXE_MODE",
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_EXEC_TIMEOUT",
    "HCCL_OP_EXPANSION_MODE",
    "INF_NAN_MODE_ENABLE",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)
"""All environment variables that are read. Everything else may be a secret."""

_ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")
_ASSIGNED = re.compile(r"(?i)\b([\w.-]*(?:token|secret|passw(?:or)?d|api[_-]?key|credentials?))(\s*[=:]\s*)\S+")

SHORTEST_NAME = 3
"""A shorter name of a user or host stands in too many words."""

COMMON = frozenset({"root", "localhost", "user", "npu", "ascend"})
"""Names that identify nobody."""


@dataclass(frozen=True)
class Redaction:
    """The names of this machine. ``home`` is written as ``~``."""

    home: str
    user: str
    host: str

    @classmethod
    def of_machine(cls) -> Redaction:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            user = ""
        return cls(str(Path.home()), user, socket.gethostname().split(".")[0])

    def text(self, text: str) -> str:
        """Without home folder, user and host."""
        for path in dict.fromkeys((self.home, os.path.realpath(self.home))):
            if len(path) > 1:
                text = re.sub(rf"{re.escape(path)}(?=[/\s:'\",;)\]]|$)", "~", text)
        text = re.sub(r"(/home/|/Users/)[^/\s:'\"]+", r"\1USER", text)
        for name, stand_in in ((self.user, "USER"), (self.host, "HOST")):
            if len(name) >= SHORTEST_NAME and name.lower() not in COMMON:
                text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", stand_in, text)
        return text

    def log(self, text: str) -> str:
        """As :meth:`text`, and without network addresses, or what is assigned to something named like a secret.

        Not for versions, which can look like an address.
        """
        return _ASSIGNED.sub(r"\1\2…", _ADDRESS.sub("ADDRESS", self.text(text)))

    def values(self, content: Any) -> Any:
        """Every text in ``content``, which is made of dictionaries, lists and plain values."""
        if isinstance(content, Mapping):
            return {self.text(str(key)): self.values(value) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return [self.values(value) for value in content]
        return self.text(content) if isinstance(content, str) else content


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those on the list that are set."""
    return {name: environment[name] for name in VARIABLES if name in environment}
