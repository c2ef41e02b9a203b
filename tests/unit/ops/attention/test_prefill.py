"""Which bounds of a band cost anything: those that some query of the call can reach."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qwen2_npu.ops.attention import prefill
from qwen2_npu.ops.attention.masks import Band


@pytest.mark.parametrize(
    ("band", "offset", "left"),
    [
        (Band(3, 5), 0, Band(None, None)),  # the fourth query looks back at 3 keys, the first ahead at 5
        (Band(2, 4), 0, Band(2, 4)),
        (Band(5, 3), 2, Band(None, None)),
        (Band(4, 2), 2, Band(4, 2)),
    ],
)
def test_a_bound_that_no_query_reaches_is_dropped(band: Band, offset: int, left: Band) -> None:
    found = prefill._simplify(band, 4, 6, offset)
    assert (found.before, found.after) == (left.before, left.after)


@pytest.mark.parametrize("band", [Band(), Band(after=0)], ids=["all", "causal"])
def test_one_length_for_all_rows_needs_no_mask(band: Band, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys behind it are cut off: nothing is left to be kept apart, row by row and block by block."""
    monkeypatch.setattr(prefill, "_in_blocks", lambda *given: pytest.fail("in blocks"))
    q, k, v = torch.randn(3, 2, 2, 5, 8).unbind(0)
    given = {"scale": 0.3, "drop": None, "band": band, "q_lens": None, "want_lse": False}
    found = prefill.prefill_attention(q[:, :, :4], k, v, kv_lens=[4], **given)
    assert torch.equal(
        found[0], prefill.prefill_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], kv_lens=None, **given)[0]
    )


@pytest.mark.parametrize("unknown", [0, 1], ids=["q", "kv"])
def test_lengths_that_are_not_known_yet_are_subtracted_on_the_device(unknown: int) -> None:
    """Telling equal offsets apart would put a guard into the graph, for one length alone."""

    def offset(x: torch.Tensor) -> torch.Tensor:
        lens = [[1, 3], [4, 6]]
        lens[unknown][1] = x.shape[0]
        found = prefill._offset(*lens, x.device)
        assert isinstance(found, torch.Tensor)
        return found

    graph = make_fx(offset, tracing_mode="symbolic")(torch.zeros(6 if unknown else 3))  # where both are 3
    for size in (5, 8):
        assert graph(torch.zeros(size)).flatten().tolist() == [3, 6 - size if unknown == 0 else size - 3]


@pytest.mark.parametrize("which", ["rows", "cols", "offset"])
def test_a_size_that_is_not_known_yet_is_not_compared(which: str) -> None:
    """Comparing it would put a guard into the graph, for one length alone."""
    sizes = {"rows": 4, "cols": 6, "offset": 0} | {which: object()}
    assert prefill._simplify(Band(3, 5), **sizes) == Band(3, 5)  # type: ignore[arg-type]
