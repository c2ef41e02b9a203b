"""Ranks that differ all say the same: which one, and in what."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from qwen2_npu.conformance import tiny
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel.agreement import SHOWN, agree, fingerprint, versions
from qwen2_npu.parallel.launch import RankGroup


def messages(*facts, **options):
    """What each rank says, one per entry of ``facts``."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))  # for ranks that wait for one another in vain

    def rank(number):
        try:
            agree(facts[number], group=RankGroup(number, len(facts), torch.device("cpu"), store), **options)
        except UnsupportedError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(rank, range(len(facts))))


def test_the_same_facts():
    assert messages({"a": 1, "b": None}, {"b": None, "a": 1}, {"a": 1}) == ["", "", ""]


def test_different_facts_are_named_on_every_rank():
    old, new = {"transformers": "5.23.0"}, {"transformers": "5.24.0"}
    said = messages(new, old, new, way_out="install the same")
    assert said == ["rank 1 has transformers 5.23.0, rank 0 has 5.24.0: install the same"] * 3


def test_what_only_one_rank_has():
    assert messages({}, {"deepspeed": "0.19.8"})[0].startswith("rank 1 has deepspeed 0.19.8, rank 0 has none: ")
    assert messages({"deepspeed": "0.19.8"}, {})[1].startswith("rank 1 has deepspeed none, rank 0 has 0.19.8: ")


@pytest.mark.parametrize(
    ("first", "other"), [("a" * 5000 + "b", "a" * 5000 + "c"), ("a\nb", "a b"), ("x" * 500, "x" * 501), (1, True)]
)
def test_long_values_are_one_short_line_that_shows_the_difference(first, other):
    (message, _) = messages({"prompt": first}, {"prompt": other})
    assert "\n" not in message
    assert len(message) < 3 * SHOWN + 60
    shown = message.removeprefix("rank 1 has prompt ").split(": give")[0].split(", rank 0 has ")
    assert shown[0] != shown[1]


def test_a_second_agreement_is_another_one():
    store = dist.HashStore()

    def rank(number):
        group = RankGroup(number, 2, torch.device("cpu"), store)
        for value in range(3):
            agree({"value": value}, group=group)
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == [True, True]


def test_alone_there_is_nothing_to_compare():
    agree({"a": object()})  # not even written as JSON


def test_versions():
    found = versions()
    assert found["torch"] == torch.__version__
    json.dumps(found)


def test_a_fingerprint_tells_checkpoints_apart(tmp_path):
    source = tiny.path()
    for path in source.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert fingerprint(tmp_path) == fingerprint(source)
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    source = fingerprint(tmp_path)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before + b" ")
        changed = fingerprint(tmp_path)
        assert {key for key in changed if changed[key] != source[key]} == {name}
        (tmp_path / name).write_bytes(before)
