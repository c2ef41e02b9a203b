"""Whatever goes wrong in one rank: all processes end, in the stated time, and one message says why."""

from __future__ import annotations

import pytest

from tests.unit.parallel.job import BOTH, NO_DEEPSPEED, NO_NPU, run, script

TIMEOUT = 3

LAUNCHER = 6.0
"""Seconds that a launcher, and a busy machine, may need beside what docs/parallel.md states."""

GRACE = 3.0

MESSAGES = {
    "raises": "ValueError: this is the cause",
    "is killed": "rank {who} ended without a word: killed",
    "hangs": "rank {who} did not take part in a collective within 3 s",
    "is stopped": ("rank {who} is gone: killed, stopped", "rank {who} gave no sign of life for 3 s"),
}
"""What happens -> what is said. Of two, one."""


def check(done, what, who):
    assert done.status != 0
    assert not done.left
    assert done.took < (TIMEOUT + GRACE + LAUNCHER if what in ("hangs", "is stopped") else LAUNCHER)
    texts = MESSAGES[what] if isinstance(MESSAGES[what], tuple) else (MESSAGES[what],)
    said = [line for text in texts for line in done.lines(text.format(who=who))]
    # The launcher that sees a rank killed may end the others before they have said it.
    launcher = what == "is killed" and (
        "exitcode: -9" in done.errors or "return code = -9" in done.output + done.errors
    )
    assert len(said) == 1 or (launcher and not said), done.errors
    assert sum(line.endswith("Traceback (most recent call last):") for line in done.lines("[rank")) <= 2, done.errors
    ranks = {line.split("]")[0] for line in done.lines("[rank")}
    assert len(ranks) <= 1, f"more than one rank speaks: {done.errors}"


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("what", MESSAGES)
@pytest.mark.parametrize("launcher", BOTH)
def test_on_cpu(launcher, what, who, tmp_path):
    check(run(launcher, [script(tmp_path), what, str(who)], tmp_path, timeout=TIMEOUT), what, who)


@pytest.mark.slow
@NO_NPU
@pytest.mark.parametrize(
    ("launcher", "what", "who"),
    [
        ("torchrun", "raises", 0),
        ("torchrun", "hangs", 1),
        pytest.param("deepspeed", "is killed", 0, marks=NO_DEEPSPEED),
        pytest.param("deepspeed", "is stopped", 0, marks=NO_DEEPSPEED),
    ],
)
def test_on_emulated_cards(launcher, what, who, tmp_path):
    check(run(launcher, [script(tmp_path), what, str(who)], tmp_path, timeout=TIMEOUT, device="npu"), what, who)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", BOTH)
def test_a_rank_that_ends_with_a_status_ends_the_job(launcher, tmp_path):
    done = run(launcher, [script(tmp_path), "ends", "1"], tmp_path)
    assert done.status in (1, 3)
    assert not done.left
    assert done.took < LAUNCHER
    assert not done.lines("[rank")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", BOTH)
def test_ranks_end_with_their_launcher(launcher, tmp_path):
    done = run(launcher, [script(tmp_path), "kills its launcher", "1"], tmp_path, timeout=60)
    assert not done.left
    assert done.took < LAUNCHER
    assert done.lines("the launcher is gone") == ["error: the launcher is gone: it was killed"]
