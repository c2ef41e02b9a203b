"""The forms of the inference attention that differ from version 1 in names alone, or write into given tensors."""

from __future__ import annotations

import pytest
import torch
import torch_npu

from tests.unit.emulator.eager.operators.harness import draw

COMMON = {"input_layout": "BSND", "atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(1), "sparse_mode": 3}


def tensors():
    return [draw(2, 5, heads, 16, dtype=torch.bfloat16, grad=False, seed=heads).npu() for heads in (4, 2, 2)]


def common():
    return {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in COMMON.items()}


def first_version(**more):
    return torch_npu.npu_fused_infer_attention_score(
        *tensors(), num_heads=4, num_key_value_heads=2, scale=0.25, softmax_lse_flag=True, **common(), **more
    )


def test_version_2_is_version_1_under_other_names():
    found = torch_npu.npu_fused_infer_attention_score_v2(
        *tensors(),
        num_query_heads=4,
        num_key_value_heads=2,
        softmax_scale=0.25,
        return_softmax_lse=True,
        actual_seq_qlen=[5, 3],
        actual_seq_kvlen=[5, 4],
        **common(),
    )
    expected = first_version(actual_seq_lengths=[5, 3], actual_seq_lengths_kv=[5, 4])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("version", ["", "_v2"])
@pytest.mark.parametrize("layout", ["BSND", "BSH", "BNSD", "BNSD_BSND"])
def test_results_are_written_into_the_given_tensors(layout, version):
    q, k, v = (x.transpose(1, 2).contiguous() if "BNSD" in layout else x for x in tensors())
    q, k, v = (x.flatten(2) if layout == "BSH" else x for x in (q, k, v))
    shared = {**common(), "num_key_value_heads": 2, "input_layout": layout}
    first = {"num_heads": 4, "softmax_lse_flag": True, "scale": 0.25}
    names = ("num_query_heads", "return_softmax_lse", "softmax_scale") if version else tuple(first)
    named = dict(zip(names, first.values(), strict=True))
    name = f"npu_fused_infer_attention_score{version}"
    shaping = {key: value for key, value in {**named, **shared}.items() if key in (*names[:2], "input_layout")}
    workspace = getattr(torch_npu, f"_{name}_get_max_workspace")(q, k, v, **named, **shared)
    out = list(getattr(torch_npu, f"_{name}_infer_output")(q, v, **shaping))
    found = getattr(torch_npu, name).out(q, k, v, workspace=workspace, out=out, **named, **shared)
    expected = torch_npu.npu_fused_infer_attention_score(q, k, v, **first, **shared)
    for one, given, other in zip(found, out, expected, strict=True):
        assert one.data_ptr() == given.data_ptr()
        assert torch.equal(given, other)


def test_training_attention_into_given_tensors():
    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors())
    outputs = torch_npu._npu_fusion_attention_v3_infer_output(q, k, v, 4, "BNSD")
    numbers = (torch.empty(1, dtype=torch.int64, device="npu") for _ in range(2))
    out = [*outputs, torch.empty_like(outputs[1]), *numbers]
    torch_npu.npu_fusion_attention_v3.out(q, k, v, 4, "BNSD", scale=0.25, out=out)
    expected = torch_npu.npu_fusion_attention_v3(q, k, v, 4, "BNSD", scale=0.25)
    assert all(torch.equal(out[place], expected[place]) for place in (0, 1, 2, 4, 5))
