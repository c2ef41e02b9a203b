"""The schemas of the implemented operators, exactly torch_npu 2.13.0's, and which of their arguments we lack.

Both are data: the registry defines the operators from `SCHEMAS`, the kernels refuse what `UNSUPPORTED` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

LIBRARY: Final = "npu"

# Operator name -> schema without the library prefix.
SCHEMAS: Final = MappingProxyType(
    {
        "npu_prompt_flash_attention": (
            "npu_prompt_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
            "Tensor? atten_mask=None, Tensor? pse_shift=None, int[]? actual_seq_lengths=None, "
            "Tensor? deq_scale1=None, Tensor? quant_scale1=None, Tensor? deq_scale2=None, "
            "Tensor? quant_scale2=None, Tensor? quant_offset2=None, int num_heads=1, float scale_value=1., "
            'int pre_tokens=2147483647, int next_tokens=0, str input_layout="BSH", int num_key_value_heads=0, '
            "int[]? actual_seq_lengths_kv=None, int sparse_mode=0) -> Tensor"
        ),
        "npu_incre_flash_attention": (
            "npu_incre_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
            "Tensor? atten_mask=None, Tensor? pse_shift=None, SymInt[]? actual_seq_lengths=None, "
            "Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? block_table=None, "
            "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, "
            "Tensor? quant_scale2=None, Tensor? quant_offset2=None, Tensor? kv_padding_size=None, "
            'int num_heads=1, float scale_value=1., str input_layout="BSH", int num_key_value_heads=0, '
            "int block_size=0, int inner_precise=1) -> Tensor"
        ),
        "npu_fused_infer_attention_score": (
            "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, "
            "Tensor? pse_shift=None, Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, "
            "SymInt[]? actual_seq_lengths_kv=None, Tensor? dequant_scale1=None, Tensor? quant_scale1=None, "
            "Tensor? dequant_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, "
            "Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? key_antiquant_scale=None, "
            "Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None, "
            "Tensor? value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None, "
            "Tensor? kv_padding_size=None, Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, "
            "SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None, "
            "Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1., "
            'int pre_tokens=2147483647, int next_tokens=2147483647, str input_layout="BSH", '
            "int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, int block_size=0, "
            "int antiquant_mode=0, int key_antiquant_mode=0, int value_antiquant_mode=0, "
            "bool softmax_lse_flag=False) -> (Tensor, Tensor)"
        ),
        "npu_rms_norm": (
            "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)"
        ),
        "npu_add_rms_norm": (
            "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, "
            "float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor, Tensor)"
        ),
        "npu_apply_rotary_pos_emb": (
            'npu_apply_rotary_pos_emb(Tensor query, Tensor key, Tensor cos, Tensor sin, str layout="BSND", '
            'str rotary_mode="half") -> (Tensor, Tensor)'
        ),
        "npu_rotary_mul": (
            'npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor'
        ),
        "scatter_update_": "scatter_update_(Tensor(a!) input, Tensor indices, Tensor updates, int axis) -> Tensor(a!)",
        "scatter_update": "scatter_update(Tensor input, Tensor indices, Tensor updates, int axis) -> Tensor",
        "npu_scatter_pa_kv_cache": (
            "npu_scatter_pa_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
            "Tensor slot_mapping, *, Tensor? compress_lens=None, Tensor? compress_seq_offsets=None, "
            'Tensor? seq_lens=None, str? cache_mode="PA_NZ") -> ()'
        ),
        "npu_scatter_pa_kv_cache_functional": (
            "npu_scatter_pa_kv_cache_functional(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, "
            "Tensor slot_mapping, *, Tensor? compress_lens=None, Tensor? compress_seq_offsets=None, "
            'Tensor? seq_lens=None, str? cache_mode="PA_NZ") -> (Tensor, Tensor)'
        ),
        "npu_swiglu": "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
        "npu_mm_all_reduce_base": (
            'npu_mm_all_reduce_base(Tensor x1, Tensor x2, str hcom, *, str reduce_op="sum", Tensor? bias=None, '
            "Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? x3=None, "
            "Tensor? dequant_scale=None, Tensor? pertoken_scale=None, Tensor? comm_quant_scale_1=None, "
            "Tensor? comm_quant_scale_2=None, int antiquant_group_size=0, int comm_turn=0, "
            "int[]? group_sizes=None, int? y_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
            "int? dequant_scale_dtype=None, int? pertoken_scale_dtype=None, int comm_quant_mode=0, "
            "str? comm_mode=None) -> Tensor"
        ),
        "npu_moe_gating_top_k_softmax": (
            "npu_moe_gating_top_k_softmax(Tensor x, Tensor? finished=None, int k=1) -> (Tensor, Tensor, Tensor)"
        ),
        "npu_moe_init_routing_v2": (
            "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, "
            "int active_num=-1, int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, "
            "int expert_tokens_num_type=0, bool expert_tokens_num_flag=False, int quant_mode=-1, "
            "int[2] active_expert_range=[], int row_idx_type=0, int? x_dtype=None) "
            "-> (Tensor, Tensor, Tensor, Tensor)"
        ),
        "npu_grouped_matmul": (
            "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, "
            "Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, "
            "Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None, "
            "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, "
            "int? split_item=0, int? group_type=None, int? group_list_type=0, int? act_type=0, "
            "int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None, "
            "int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]"
        ),
        "npu_moe_finalize_routing": (
            "npu_moe_finalize_routing(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, Tensor? bias, "
            "Tensor? scales, Tensor expanded_src_to_dst_row, Tensor? export_for_source_row, "
            "int? drop_pad_mode=0, int? k=1) -> Tensor"
        ),
        "npu_weight_quant_batchmatmul": (
            "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? "
            "antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, "
            "int antiquant_group_size=0, int inner_precise=0, int? weight_dtype=None) -> Tensor"
        ),
        "npu_quant_matmul": (
            "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? "
            "pertoken_scale=None, Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? "
            "x2_dtype=None, int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, "
            "Tensor? y_scale=None) -> Tensor"
        ),
        "npu_dynamic_quant": (
            "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? "
            'dst_type=None, str quant_mode="pertoken", float dst_type_max=0.) -> (Tensor, Tensor)'
        ),
        "npu_add_rms_norm_dynamic_quant": (
            "npu_add_rms_norm_dynamic_quant(Tensor x1, Tensor x2, Tensor gamma, *, Tensor? "
            "smooth_scale1=None, Tensor? smooth_scale2=None, Tensor? beta=None, float "
            "epsilon=9.9999999999999995e-07, bool[2]? output_mask=None, int? y_dtype=None) -> (Tensor, "
            "Tensor, Tensor, Tensor, Tensor)"
        ),
        "npu_dequant_swiglu_quant": (
            "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, "
            "Tensor? bias=None, Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? "
            "group_index=None, bool activate_left=False, int quant_mode=0, int? dst_type=None, int? "
            "round_mode=None, int? activate_dim=None, int swiglu_mode=0, float clamp_limit=7., float "
            "glu_alpha=1.702, float glu_bias=1.) -> (Tensor, Tensor)"
        ),
    }
)

_QUANTISATION = ("quant_scale1", "quant_scale2", "quant_offset2")
_ANTIQUANTISATION = ("antiquant_scale", "antiquant_offset")
_COMPRESSION = ("compress_lens", "compress_seq_offsets", "seq_lens")


def _absent(*names: str) -> dict[str, object]:
    return dict.fromkeys(names, None)


# Operator name -> {argument: its default}: an argument listed here raises unless it has that value.
UNSUPPORTED: Final[Mapping[str, Mapping[str, object]]] = MappingProxyType(
    {
        "npu_prompt_flash_attention": _absent("padding_mask", "pse_shift", "deq_scale1", "deq_scale2", *_QUANTISATION),
        "npu_incre_flash_attention": {
            **_absent("padding_mask", "pse_shift", "block_table", "dequant_scale1", "dequant_scale2"),
            **_absent(*_QUANTISATION, *_ANTIQUANTISATION),
            "block_size": 0,
        },
        "npu_fused_infer_attention_score": {
            **_absent("pse_shift", "block_table", "query_padding_size", "dequant_scale1", "dequant_scale2"),
            **_absent(*_QUANTISATION, *_ANTIQUANTISATION),
            **_absent("key_antiquant_scale", "key_antiquant_offset"),
            **_absent("value_antiquant_scale", "value_antiquant_offset"),
            **_absent("key_shared_prefix", "value_shared_prefix", "actual_shared_prefix_len"),
            **_absent("query_rope", "key_rope", "key_rope_antiquant_scale"),
            "block_size": 0,
            "antiquant_mode": 0,
            "key_antiquant_mode": 0,
            "value_antiquant_mode": 0,
        },
        "npu_rotary_mul": _absent("rotate"),
        "npu_scatter_pa_kv_cache": _absent(*_COMPRESSION),
        "npu_scatter_pa_kv_cache_functional": _absent(*_COMPRESSION),
        "npu_mm_all_reduce_base": {
            **_absent(
                *_ANTIQUANTISATION, "dequant_scale", "pertoken_scale", "comm_quant_scale_1", "comm_quant_scale_2"
            ),
            **_absent("group_sizes", "y_dtype", "x1_dtype", "x2_dtype", "dequant_scale_dtype", "pertoken_scale_dtype"),
            "antiquant_group_size": 0,
            "comm_turn": 0,
            "comm_quant_mode": 0,
            "comm_mode": None,
        },
        "npu_moe_init_routing_v2": {
            **_absent("scale", "offset", "x_dtype"),
            "expert_capacity": -1,
            "drop_pad_mode": 0,
            "quant_mode": -1,
        },
        "npu_grouped_matmul": {
            **_absent("scale", "offset", *_ANTIQUANTISATION, "per_token_scale"),
            **_absent("activation_input", "activation_quant_scale", "activation_quant_offset"),
            **_absent("output_dtype", "x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype"),
            "act_type": 0,
        },
        "npu_weight_quant_batchmatmul": {
            **_absent("antiquant_offset", "quant_scale", "quant_offset", "weight_dtype"),
            "antiquant_group_size": 0,
        },
        "npu_quant_matmul": _absent(
            *("offset", "x1_dtype", "x2_dtype", "pertoken_scale_dtype", "scale_dtype", "group_sizes", "y_scale")
        ),
        "npu_dynamic_quant": {"group_index": None, "quant_mode": "pertoken", "dst_type_max": 0.0},
        "npu_add_rms_norm_dynamic_quant": _absent("smooth_scale1", "smooth_scale2", "beta"),
        "npu_dequant_swiglu_quant": {
            **_absent("bias", "quant_scale", "quant_offset", "group_index"),
            **{"swiglu_mode": 0, "clamp_limit": 7.0, "glu_alpha": 1.702, "glu_bias": 1.0},
        },
    }
)
