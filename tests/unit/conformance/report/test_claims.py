"""How a claim is said."""

from __future__ import annotations

import math

import pytest

from qwen2_npu.conformance.machine.fingerprint import Fingerprint
from qwen2_npu.conformance.machine.verified import Verified, Where, place
from qwen2_npu.conformance.report.claims import Claim, Status, Value, plain_number, without_result, worst


@pytest.mark.parametrize(
    ("verified", "expected"),
    [
        ("npu (CANN 8.2.RC1)", Where.NPU),
        ("emulated (torch_npu 2.13.0, torchair)", Where.EMULATED),
        ("cpu (portable kernels)", Where.CPU),
        ("cuda (portable kernels)", Where.CUDA),
        ("", Where.NOT_SAID),
        (None, Where.NOT_SAID),
        ("npu-like", Where.NOT_SAID),
        ("not an npu (CANN 8)", Where.NOT_SAID),
    ],
)
def test_one_never_passes_for_another(verified: str | None, expected: Where) -> None:
    read = Verified.read(verified)
    assert read.where is expected
    assert read.text == (verified or ""), "files are written as they were read"


def test_the_environment_says_it_in_these_words() -> None:
    assert Verified.on("cpu").where is place("cpu") is Where.CPU
    assert Verified.on("cuda:1").where is place("cuda:1") is Where.CUDA
    assert Verified.on("mps").where is place("mps") is Where.NOT_SAID


@pytest.mark.parametrize("kind", [kind for kind in Where if kind is not Where.NOT_SAID])
def test_what_files_hold_is_read_back(kind: Where) -> None:
    made = Verified.of(kind, "details")
    assert made.where is kind
    assert Verified.read(made.text) == made
    assert Fingerprint.read({"verified": made.text}).where is kind


@pytest.mark.parametrize(("emulated", "expected"), [(True, Where.EMULATED), (False, Where.NPU)])
def test_the_emulator_s_npu_is_not_a_real_one(emulated: bool, expected: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_npu.emulator.is_active", lambda: emulated)
    assert Verified.on("npu:0").where is place("npu:0") is expected


def test_the_worst_of_several() -> None:
    assert worst([Status.PASS, Status.NOT_RUN]) is Status.NOT_RUN
    assert worst([Status.PASS, Status.NOT_RUN, Status.FAIL]) is Status.FAIL
    assert worst([Status.PASS, Status.NOT_COMPARABLE]) is Status.NOT_COMPARABLE
    assert worst([]) is Status.NOT_RUN


@pytest.mark.parametrize(
    ("now", "then", "expected"),
    [
        (27.1, 23.4, "23.4 → 27.1 ms (+16\u00a0%)"),
        (24.0, 23.4, "23.4 → 24 ms (+2.6\u00a0%)"),
        (1274.2, 1220.0, "1220 → 1274 ms (+4.4\u00a0%)"),
        (5.0, 0.0, "0 → 5 ms"),
        (math.nan, 2.0, "2 → nan ms"),
    ],
)
def test_change(now: float, then: float, expected: str) -> None:
    assert Value(now, "ms").change_from(Value(then, "ms")) == expected


def test_numbers_are_short() -> None:
    assert [plain_number(x) for x in (0.000123, 1.5, 1234.5, 1e9)] == ["0.000123", "1.5", "1234", "1e+09"]


def test_why_there_is_no_result() -> None:
    def one(status: Status, message: str = "", reference: str = "") -> Claim:
        return Claim("a", "b", "c", status, message=message, reference=reference)

    claims = [
        *[one(Status.PASS, "fine"), one(Status.FAIL, "wrong"), one(Status.NOT_RUN, reference="documented 24 ms")],
        *[one(Status.NOT_RUN, "3 skipped: needs an NPU\nmore"), one(Status.NOT_RUN, "1 skipped: needs an NPU")],
        one(Status.NOT_COMPARABLE, "not comparable: needs an Atlas"),
    ]
    assert without_result(claims) == [
        ("not run: needs an NPU", 2),
        ("not run: no file of this run has a result for it", 1),
        ("not comparable: needs an Atlas", 1),
    ]
    many = [one(Status.NOT_RUN, str(number)) for number in range(9)]
    assert without_result(many)[-1] == ("for other reasons: see the list of all checks", 4)


def test_an_unsaid_claim_was_not_run() -> None:
    assert Claim("a", "b", "c").status is Status.NOT_RUN
