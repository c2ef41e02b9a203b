"""Candidates compute the same tokens from the same weights; how fast is tests/perf/test_relative.py's affair."""

from __future__ import annotations

import pytest
import torch

from tests.perf import relative
from tests.perf.relative import HAS_STATIC_CACHE, OURS, STOCK, Candidate, why_not
from tests.unit.small import small_config, small_stock


@pytest.mark.parametrize("name", [name for name in (*STOCK, *OURS) if name.endswith("eager")])
def test_a_candidate_times_prefill_and_decode(name: str) -> None:
    candidate = Candidate(name, small_stock(small_config(num_hidden_layers=2)), batch=2, prompt=6, steps=3)
    assert candidate.prefill() > 0
    first = candidate._past.get_seq_length() if hasattr(candidate._past, "get_seq_length") else 6
    assert first == 6
    assert candidate.decode() > 0
    if name in OURS:
        assert candidate._past.get_seq_length() == 6 + 1 + 3


def test_what_a_transformers_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (why_not("stock compiled") is None) is HAS_STATIC_CACHE
    assert all(why_not(name) is None for name in (*OURS, "stock eager"))
    monkeypatch.setattr(relative, "HAS_STATIC_CACHE", False)
    assert "has no static cache to compile with" in str(why_not("stock compiled"))


@pytest.mark.parametrize(("name", "mode"), [("ours eager", "eager"), ("ours compiled", "inductor")])
def test_ours_is_compiled_as_its_name_says(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(relative, "compile_model", lambda model, mode: asked.append(mode))
    Candidate(name, small_stock(small_config(num_hidden_layers=1)), batch=1, prompt=6, steps=1)
    assert asked == [mode]


def test_candidates_share_weights() -> None:
    stock = small_stock(small_config(num_hidden_layers=2))
    ours = Candidate("ours eager", stock, batch=1, prompt=6, steps=1)
    assert torch.allclose(ours.model(ours.tokens).logits, stock(ours.tokens).logits, atol=1e-4)
