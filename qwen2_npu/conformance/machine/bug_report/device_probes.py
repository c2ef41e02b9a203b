"""The open questions about the operators, as data: what is marked as an inference, or documented only in part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import qwen2_npu.ops  # noqa: F401  (registers the kernels)
from qwen2_npu.conformance.machine.bug_report.hardware_probes import bandwidth, peak
from qwen2_npu.conformance.machine.bug_report.probes import Answer, Probe

OPS: Any = torch.ops.npu
BF16 = torch.bfloat16


def _random(device: str, *shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


class _Counted:
    """A function compiled by the device's own backend, and how many graphs that took."""

    def __init__(self, function: Callable[..., Any], device: str, *, dynamic: bool) -> None:
        torch._dynamo.reset()
        self.graphs = 0
        if device.startswith("npu"):
            import torchair

            inner = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
        else:
            inner = torch._dynamo.lookup_backend("aot_eager")

        def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: Any) -> Any:
            self.graphs += 1
            return inner(module, inputs, **options)

        self.call = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


# ---- rotary ---------------------------------------------------------------------------------------------------------
def _rotary_inputs(device: str, head_dim: int = 128) -> dict[str, Any]:
    angle = _random(device, 1, 4, 1, head_dim, seed=3, dtype=torch.float32)
    return {
        "query": _random(device, 1, 4, 2, head_dim, seed=1),
        "key": _random(device, 1, 4, 2, head_dim, seed=2),
        "cos": angle.cos().to(BF16),
        "sin": angle.sin().to(BF16),
        "layout": "BSND",
    }


def rotary_in_eager(device: str) -> Answer:
    inputs = _rotary_inputs(device)
    before = inputs["query"].clone()
    query, _ = OPS.npu_apply_rotary_pos_emb(**inputs)
    same_memory = query.data_ptr() == inputs["query"].data_ptr()
    written = not torch.equal(inputs["query"].cpu(), before.cpu())
    text = "in place: the query is overwritten and returned" if same_memory and written else "out of place"
    return Answer(text, same_memory and written, {"same_memory": same_memory, "input_changed": written})


def rotary_in_a_graph(device: str) -> Answer:
    inputs = _rotary_inputs(device)
    before = inputs["query"].clone()

    def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return OPS.npu_apply_rotary_pos_emb(query, key, cos, sin, layout="BSND")

    layout = inputs.pop("layout")
    assert layout == "BSND"
    with torch.no_grad():
        _Counted(rotate, device, dynamic=False).call(**inputs)
    kept = torch.equal(inputs["query"].cpu(), before.cpu())
    return Answer("out of place: the query is kept" if kept else "in place: the query is overwritten", kept)


def rotary_of_64(device: str) -> Answer:
    inputs = _rotary_inputs(device, head_dim=64)
    try:
        OPS.npu_apply_rotary_pos_emb(**inputs)
    except Exception as error:  # the device's own type
        return Answer(f"refused: {str(error).strip().splitlines()[0][:300]}")
    return Answer("taken")


def rotary_default_layout(device: str) -> Answer:
    schema = OPS.npu_apply_rotary_pos_emb.default._schema
    default = next(argument.default_value for argument in schema.arguments if argument.name == "layout")
    return Answer(f"{default!r}", None, {"schema": str(schema)})


# ---- attention ------------------------------------------------------------------------------------------------------
def _attention_inputs(device: str, queries: int, keys: int = 8) -> dict[str, Any]:
    return {
        "query": _random(device, 2, queries, 2, 128, seed=1),
        "key": _random(device, 2, keys, 2, 128, seed=2),
        "value": _random(device, 2, keys, 2, 128, seed=3),
    }


SETTINGS: dict[str, Any] = {"num_heads": 2, "input_layout": "BSND", "scale_value": 1 / math.sqrt(128)}


LENGTHS = ([5, 7], [6, 8], [7, 9], [8, 10])
"""As they grow from step to step."""


def _graphs_for(operator: str, queries: int, lengths: Sequence[list[int]], device: str, *, dynamic: bool) -> int:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, live: list[int]) -> Any:
        return getattr(OPS, operator)(q, k, v, actual_seq_lengths=live, **SETTINGS)

    counted = _Counted(attend, device, dynamic=dynamic)
    tensors = list(_attention_inputs(device, queries, keys=16).values())
    for tensor in tensors:
        torch._dynamo.mark_static(tensor)
    with torch.no_grad():
        for live in lengths:
            counted.call(*tensors, live)
    return counted.graphs


def _specialises(operator: str, queries: int, *, dynamic: bool, assumed: bool) -> Any:
    def ask(device: str) -> Answer:
        graphs = _graphs_for(operator, queries, LENGTHS, device, dynamic=dynamic)
        text = f"{graphs} {'graph' if graphs == 1 else 'graphs'} for {len(LENGTHS)} lists of lengths"
        return Answer(text, (graphs >= len(LENGTHS)) is assumed, {"graphs": graphs, "lists": len(LENGTHS)})

    return ask


def _kind_of_row(row: torch.Tensor, values: torch.Tensor) -> tuple[str, dict[str, Any]]:
    """What a row without any live key is: (D,) against (S, D)."""
    mean, facts = values.float().mean(0), {"row_starts": row.float().tolist()[:4]}
    if not bool(torch.isfinite(row.float()).all()):
        return "not finite", facts
    if bool((row == 0).all()):
        return "zeros", facts
    distance = float((row.float() - mean).abs().max())
    close = distance <= 0.02 * float(mean.abs().max()) + 0.02
    return ("the mean of all values" if close else "finite, and not the mean of all values"), facts | {
        "distance_from_the_mean": distance
    }


def prefill_without_a_live_key(device: str) -> Answer:
    inputs = _attention_inputs(device, queries=8)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[0, 0, 3] = True
    out = OPS.npu_prompt_flash_attention(**inputs, atten_mask=mask.to(device), next_tokens=65535, **SETTINGS)
    kind, facts = _kind_of_row(out[0, 3, 0].cpu(), inputs["value"][0, :, 0].cpu())
    return Answer(kind, kind != "not finite", facts)


def decode_without_a_live_key(device: str) -> Answer:
    inputs = _attention_inputs(device, queries=1)
    mask = torch.zeros(2, 1, 1, 8, dtype=torch.bool)
    mask[0] = True
    out = OPS.npu_incre_flash_attention(**inputs, atten_mask=mask.to(device), **SETTINGS)
    kind, facts = _kind_of_row(out[0, 0, 0].cpu(), inputs["value"][0, :, 0].cpu())
    return Answer(kind, kind == "the mean of all values", facts)


def default_call_is_causal(device: str) -> Answer:
    inputs = _attention_inputs(device, queries=8)
    out = OPS.npu_prompt_flash_attention(**inputs, **SETTINGS)[0, :, 0].cpu().float()
    q, k, v = (tensor[0, :, 0].cpu().double() for tensor in inputs.values())
    scores = q @ k.T * SETTINGS["scale_value"]
    causal_scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf)
    full, causal = (float((out - s.softmax(-1) @ v).abs().max()) for s in (scores, causal_scores))
    text = "every position sees all others" if full < causal else "causal"
    return Answer(text, full < causal, {"distance_from_full": full, "distance_from_causal": causal})


def prefill_in_float16_overflows(device: str) -> Answer:
    big = torch.full((1, 8, 2, 128), 30.0, dtype=torch.float16, device=device)
    values = _random(device, 1, 8, 2, 128, dtype=torch.float16)
    out = OPS.npu_prompt_flash_attention(big, big, values, **SETTINGS).cpu()
    finite = bool(torch.isfinite(out).all())
    error = float((out.float() - values.cpu().float().mean(1, keepdim=True)).abs().max()) if finite else None
    right = error is not None and error < 0.02
    return Answer(
        "no: the result is right" if right else "yes: the result is wrong",
        None,
        {"finite": finite, "distance_from_the_mean": error},
    )


# ---- rounding -------------------------------------------------------------------------------------------------------
def _closer(got: torch.Tensor, candidates: dict[str, torch.Tensor], assumed: str) -> Answer:
    """Which order of roundings the device follows: the one that more elements equal."""
    shares = {name: float((got.cpu() == value).float().mean()) for name, value in candidates.items()}
    best = max(shares, key=lambda name: shares[name])
    return Answer(best, best == assumed, {f"share equal to {name!r}": share for name, share in shares.items()})


def norm_rounding(device: str) -> Answer:
    x1, x2 = _random(device, 64, 1024, seed=1), _random(device, 64, 1024, seed=2)
    gamma = _random(device, 1024, seed=3)
    y, _, _ = OPS.npu_add_rms_norm(x1, x2, gamma, 1e-6)
    total = (x1.cpu().float() + x2.cpu().float()).to(BF16).float()
    normed = total * torch.rsqrt(total.double().pow(2).mean(-1, keepdim=True) + 1e-6).float()
    weight = gamma.cpu().float()
    twice, once = (normed.to(BF16).float() * weight).to(BF16), (normed * weight).to(BF16)
    return _closer(y, {"rounded before gamma": twice, "rounded once": once}, "rounded before gamma")


def swiglu_rounding(device: str) -> Answer:
    x = _random(device, 64, 2048)
    gate, up = x.cpu().float().chunk(2, -1)
    active = gate * torch.sigmoid(gate)
    candidates = {"rounded once": (active * up).to(BF16), "rounded after silu": (active.to(BF16).float() * up).to(BF16)}
    return _closer(OPS.npu_swiglu(x), candidates, "rounded once")


# ---- cache ----------------------------------------------------------------------------------------------------------
def scatter_past_the_end(device: str) -> Answer:
    """Into memory of our own: the row behind the one that is written."""
    whole = torch.zeros(2, 4, 2, 128, dtype=BF16, device=device)
    updates = torch.ones(1, 1, 2, 128, dtype=BF16, device=device)
    try:
        OPS.scatter_update_(whole[:1], torch.tensor([4], device=device), updates, 1)
        written = int((whole[1].cpu() != 0).sum())
    except Exception as error:  # the device's own type
        return Answer(f"refused: {str(error).strip().splitlines()[0][:300]}")
    return Answer(f"no error; {written} elements of the next row were written", None, {"written": written})


QUESTIONS: tuple[Probe, ...] = (
    Probe(
        "pfa_lengths_in_graphs",
        "Does a graph with prompt flash attention specialise on actual_seq_lengths (an inference so far)?",
        "compile with dynamic=True and static tensors, call with four lists of lengths, count the graphs",
        "yes: one graph per list",
        _specialises("npu_prompt_flash_attention", 16, dynamic=True, assumed=True),
    ),
    Probe(
        "ifa_lengths_in_dynamic_graphs",
        "Does a decode graph with dynamic=True and mark_static serve every list of lengths?",
        "compile incremental flash attention so, call with four lists of lengths, count the graphs",
        "yes: no graph per list",
        _specialises("npu_incre_flash_attention", 1, dynamic=True, assumed=False),
    ),
    Probe(
        "ifa_lengths_in_static_graphs",
        "Does a decode graph with dynamic=False recompile for every list of lengths?",
        "as above, with dynamic=False",
        "yes: one graph per list",
        _specialises("npu_incre_flash_attention", 1, dynamic=False, assumed=True),
    ),
    Probe(
        "rotary_in_eager",
        "Does npu_apply_rotary_pos_emb run in place in eager, although its schema declares no alias?",
        "call it, compare the result's address with the query's and the query with its copy",
        "yes",
        rotary_in_eager,
    ),
    Probe(
        "rotary_in_a_graph",
        "Does npu_apply_rotary_pos_emb leave its inputs alone in a graph?",
        "call it compiled, compare the query with its copy",
        "yes: torchair inserts a TensorMove",
        rotary_in_a_graph,
    ),
    Probe(
        "rotary_of_head_dim_64",
        "Does npu_apply_rotary_pos_emb take a head_dim of 64, as documented, or only 128 (the model avoids it)?",
        "call it with 64",
        "",
        rotary_of_64,
    ),
    Probe(
        "rotary_default_layout",
        "What is the default of npu_apply_rotary_pos_emb's layout?",
        "read the schema",
        "",
        rotary_default_layout,
    ),
    Probe(
        "pfa_row_without_a_live_key",
        "What does prompt flash attention return for a row whose keys are all masked (documented as unsupported)?",
        "mask one row, look at its output",
        "something finite",
        prefill_without_a_live_key,
    ),
    Probe(
        "ifa_row_without_a_live_key",
        "What does incremental flash attention return for a row whose keys are all masked?",
        "mask one row, look at its output",
        "the mean of the values",
        decode_without_a_live_key,
    ),
    Probe(
        "pfa_default_call",
        "Is a call without a mask causal, given the default next_tokens=0?",
        "call without a mask, compare with full and with causal attention",
        "no: every position sees all others",
        default_call_is_causal,
    ),
    Probe(
        "pfa_float16_scores",
        "Do unscaled scores above 65504 overflow in float16 (inner_precise=1)?",
        "queries and keys of 30 with head_dim 128: scores of 115200, equal for all keys",
        "",
        prefill_in_float16_overflows,
    ),
    Probe(
        "add_rms_norm_rounding",
        "Is x·rstd rounded before gamma in npu_add_rms_norm with bf16?",
        "count the elements that equal either order of roundings",
        "yes",
        norm_rounding,
    ),
    Probe(
        "swiglu_rounding",
        "Does npu_swiglu round once, or after silu as well?",
        "count the elements that equal either order of roundings",
        "once",
        swiglu_rounding,
    ),
    Probe(
        "scatter_past_the_end",
        "What does scatter_update_ do with an index past the end of its row?",
        "write at the end of the first half of a buffer, look at the second half",
        "",
        scatter_past_the_end,
    ),
    Probe(
        "memory_bandwidth",
        "Which bandwidth does the device memory reach (inferred so far from the guide's tables)?",
        "copy 512 MiB on the device, 20 times, between events",
        "0.8 TB/s at most",
        bandwidth,
        real_npu_only=True,
    ),
    Probe(
        "bf16_peak",
        "Which rate do bf16 matrix products reach (reported by a cloud provider so far)?",
        "multiply matrices of 8192 × 8192, 10 times, between events",
        "280 TFLOP/s at most",
        peak,
        real_npu_only=True,
    ),
)
