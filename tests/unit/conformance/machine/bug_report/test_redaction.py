"""What leaves the machine."""

from __future__ import annotations

import pytest

from qwen2_npu.conformance.machine.bug_report.redaction import VARIABLES, Redaction, variables

CLEAN = Redaction(home="/home/mei.lin", user="mei.lin", host="atlas-17")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/mei.lin/models/7B", "~/models/7B"),
        ("in /home/mei.lin", "in ~"),
        ("/home/mei.linen/x", "/home/USER/x"),
        ("owner mei.lin on atlas-17:", "owner USER on HOST:"),
        ("/Users/bob/x and /home/bob/y", "/Users/USER/x and /home/USER/y"),
        ("tokenizers: 0.23.3, driver 24.1.0.3", "tokenizers: 0.23.3, driver 24.1.0.3"),
    ],
)
def test_text(text: str, expected: str) -> None:
    assert CLEAN.text(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("connect 192.168.1.17:5000", "connect ADDRESS:5000"),
        ("HF_TOKEN=hf_abcdef0123 next", "HF_TOKEN=… next"),
        ("password: hunter2", "password: …"),
        ("my_api_key = abc", "my_api_key = …"),
    ],
)
def test_log(text: str, expected: str) -> None:
    assert CLEAN.log(text) == expected


def test_values_of_any_depth() -> None:
    content = {"/home/mei.lin": ["on atlas-17", 3, None, {"a": ("/home/mei.lin/x",)}]}
    assert CLEAN.values(content) == {"~": ["on HOST", 3, None, {"a": ["~/x"]}]}


def test_short_and_common_names_stay() -> None:
    common = Redaction(home="/root", user="root", host="vm")
    assert common.text("the root of a vm, /root/x") == "the root of a vm, ~/x"


def test_only_listed_variables_are_read() -> None:
    environment = {"HF_TOKEN": "hf_x", "AWS_SECRET_ACCESS_KEY": "x", "EXE_MODE": "eager", "PATH": "/home/mei.lin"}
    assert variables(environment) == {"EXE_MODE": "eager"}
    assert not any(word in name for name in VARIABLES for word in ("TOKEN", "SECRET", "KEY", "PASS"))


def test_of_this_machine() -> None:
    found = Redaction.of_machine()
    assert found.text(f"{found.home}/a") == "~/a"
