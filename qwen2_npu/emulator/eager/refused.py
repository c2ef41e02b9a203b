"""torch_npu's operators that are not computed on the emulated device, and why. Calling one raises with its reason."""

from __future__ import annotations

_CARDS = "it exchanges data between cards inside one kernel"
_ATB = "it belongs to the ATB library, which serving frameworks bring along"
_QUANTISED = "its number formats or its order of roundings are not those that PyTorch on CPU can reproduce"
_DETECTION = "it is made for object detection"
_LATENT = "it is made for latent, sparse or linear attention, which Qwen2 does not have"
_EXPERTS = "of the mixture-of-experts operators only gating, sorting, grouped products and putting back are computed"
_RECURRENT = "nn.LSTM and nn.GRU do not reach it: PyTorch's own formulas are used in their place"
_SCHEDULING = "it belongs to serving with attention and experts on separate cards"
_SUPERSEDED = "it is a fused operator of older models, superseded by npu_fusion_attention"
_OVERFLOW = "there is no overflow register: like an 910B in INF_NAN mode, results hold inf and NaN themselves"

_NAMES: dict[str, str] = {
    _ATB: """
        atb::_npu_flash_attention atb::_npu_flash_attention_prefix_v2.out atb::_npu_flash_attention_qlens
        atb::_npu_flash_attention_unpad atb::_npu_flash_attention_unpad_v2 atb::_npu_flash_attention_v2.out
        atb::_npu_flash_attention_v3 atb::_npu_group_topk atb::_npu_matmul_add_fp32
        atb::_npu_multi_head_latent_attention_get_workspace.lse atb::_npu_paged_attention
        atb::_npu_paged_attention_get_workspace atb::_npu_paged_attention_mla atb::_npu_paged_attention_quant
        atb::_npu_paged_attention_splitfuse atb::_npu_paged_attention_splitfuse_v2 atb::_npu_paged_attention_v2.out
        atb::_npu_paged_attention_v2_get_workspace atb::_npu_quant_rms_norm atb::_npu_quantize_per_tensor
        atb::_npu_reshape_and_cache atb::_npu_reshape_and_cache_siso atb::_npu_rotary_embedding
        atb::npu_fused_add_topk_div atb::npu_fused_add_topk_div.out atb::npu_mla_preprocess
        atb::npu_mla_preprocess.out atb::npu_multi_head_latent_attention atb::npu_multi_head_latent_attention.lse
        atb::npu_multi_head_latent_attention.lse_out atb::npu_multi_head_latent_attention.out
        atb::npu_paged_cache_load atb::npu_paged_cache_load.out atb::npu_ring_mla atb::npu_ring_mla.out
        atb::npu_self_attention_prefix_encoder atb::npu_self_attention_prefix_encoder.out
    """,
    _CARDS: """
        npu::_npu_distribute_barrier npu::npu_all_gather_quant_mm npu::npu_all_to_all_matmul
        npu::npu_all_to_all_quant_matmul npu::npu_alltoallv_gmm npu::npu_alltoallv_quant_gmm npu::npu_gmm_alltoallv
        npu::npu_matmul_all_to_all npu::npu_moe_distribute_combine npu::npu_moe_distribute_combine_add_rms_norm
        npu::npu_moe_distribute_combine_v2 npu::npu_moe_distribute_dispatch npu::npu_moe_distribute_dispatch_v2
        npu::npu_quant_gmm_alltoallv npu::npu_quant_matmul_all_to_all npu::npu_quant_mm_reduce_scatter
        npu::npu_ring_attention_update
    """,
    _QUANTISED: """
        aten::_scaled_grouped_mm aten::_scaled_grouped_mm_v2 npu::_npu_rms_norm_backward_quant
        npu::_npu_swiglu_backward_mx_quant_with_dual_axis npu::_quantize_per_channel_impl.out
        npu::_quantize_per_tensor_impl.out npu::npu_add_quant_gmm npu::npu_add_quant_gmm_ npu::npu_add_quant_matmul
        npu::npu_add_quant_matmul_ npu::npu_add_rms_norm_cast npu::npu_add_rms_norm_dynamic_mx_quant
        npu::npu_add_rms_norm_quant npu::npu_anti_mx_quant
        npu::npu_convert_weight_to_int4pack npu::npu_dequant_bias npu::npu_dequant_rope_quant_kvcache
        npu::npu_dual_level_quant_matmul npu::npu_dynamic_block_mx_quant
        npu::npu_dynamic_block_quant npu::npu_dynamic_dual_level_mx_quant npu::npu_dynamic_mx_quant
        npu::npu_dynamic_mx_quant_with_dual_axis npu::npu_gelu_quant
        npu::npu_group_quant npu::npu_grouped_dynamic_block_quant npu::npu_grouped_dynamic_mx_quant
        npu::npu_grouped_matmul_swiglu_quant npu::npu_grouped_matmul_swiglu_quant_v2 npu::npu_hans_decode.out
        npu::npu_hans_encode.out npu::npu_ifmr npu::npu_kronecker_quant npu::npu_matmul_compress_dequant
        npu::npu_quant_conv2d npu::npu_quant_fusion_attention npu::npu_quant_fusion_attention_backward
        npu::npu_quant_grouped_matmul_dequant npu::npu_quant_matmul_dequant npu::npu_quant_matmul_gelu
        npu::npu_quant_matmul_reduce_sum npu::npu_quant_max npu::npu_quant_scatter npu::npu_quant_scatter_
        npu::npu_rms_norm_dynamic_mx_quant npu::npu_rms_norm_quant npu::npu_rms_norm_quant_v2
        npu::npu_rope_quant_kvcache npu::npu_rotate_quant npu::npu_sign_bits_pack npu::npu_sign_bits_unpack
        npu::npu_swiglu_group_quant npu::npu_swiglu_group_quant_backward npu::npu_swiglu_mx_quant
        npu::npu_swiglu_mx_quant_with_dual_axis npu::npu_swiglu_quant npu::npu_trans_quant_param
        npu::npu_transpose_quant_batchmatmul npu::npu_weight_quant_preprocess
    """,
    _DETECTION: """
        npu::_npu_ciou npu::npu_anchor_response_flags npu::npu_batch_nms npu::npu_bounding_box_decode
        npu::npu_bounding_box_encode npu::npu_ciou npu::npu_ciou_backward npu::npu_deformable_conv2d
        npu::npu_deformable_conv2dbk npu::npu_diou npu::npu_diou_backward npu::npu_giou npu::npu_giou_backward
        npu::npu_grid_assign_positive npu::npu_iou npu::npu_nms_rotated npu::npu_nms_v4 npu::npu_nms_with_mask
        npu::npu_ps_roi_pooling npu::npu_ps_roi_pooling_backward npu::npu_ptiou npu::npu_random_choice_with_mask
        npu::npu_roi_align npu::npu_roi_alignbk npu::npu_rotated_box_decode npu::npu_rotated_box_encode
        npu::npu_rotated_iou npu::npu_rotated_overlaps npu::npu_sub_sample npu::npu_yolo_boxes_encode
    """,
    _LATENT: """
        npu::npu_block_sparse_attention npu::npu_block_sparse_attention_backward npu::npu_chunk_gated_delta_rule
        npu::npu_dense_lightning_indexer_grad_kl_loss npu::npu_dense_lightning_indexer_softmax_lse
        npu::npu_fused_causal_conv1d npu::npu_fused_causal_conv1d_v2 npu::npu_fused_floyd_attention
        npu::npu_fused_floyd_attention_backward npu::npu_kv_quant_sparse_flash_attention
        npu::npu_kv_rmsnorm_rope_cache npu::npu_kv_rmsnorm_rope_cache_v2
        npu::npu_kv_rmsnorm_rope_cache_v2_functional npu::npu_lightning_indexer npu::npu_lightning_indexer_grad
        npu::npu_masked_causal_conv1d npu::npu_masked_causal_conv1d_backward npu::npu_mhc_post
        npu::npu_mhc_post_backward npu::npu_mhc_pre npu::npu_mhc_pre_backward npu::npu_mhc_sinkhorn
        npu::npu_mhc_sinkhorn_backward npu::npu_mla_prolog npu::npu_mla_prolog_v2 npu::npu_mla_prolog_v3
        npu::npu_mla_prolog_v3_functional npu::npu_nsa_compress npu::npu_nsa_compress_attention
        npu::npu_nsa_compress_attention_infer npu::npu_nsa_compress_grad npu::npu_nsa_compress_infer.cache
        npu::npu_nsa_select_attention npu::npu_nsa_select_attention_grad npu::npu_nsa_select_attention_infer
        npu::npu_quant_lightning_indexer npu::npu_recurrent_gated_delta_rule
        npu::npu_recurrent_gated_delta_rule_functional npu::npu_sparse_flash_attention
        npu::npu_sparse_flash_attention_grad npu::npu_sparse_lightning_indexer_grad_kl_loss
    """,
    _EXPERTS: """
        npu::_npu_moe_token_unpermute_with_routing_map npu::npu_grouped_matmul_add npu::npu_grouped_matmul_add_
        npu::npu_grouped_matmul_finalize_routing npu::npu_moe_gating_top_k npu::npu_moe_gating_top_k_backward
        npu::npu_moe_gating_top_k_softmax_v2 npu::npu_moe_init_routing_quant
        npu::npu_moe_re_routing npu::npu_moe_token_permute_with_routing_map
        npu::npu_moe_token_permute_with_routing_map_grad npu::npu_moe_token_unpermute_with_routing_map
        npu::npu_moe_token_unpermute_with_routing_map_grad npu::npu_moe_update_expert
    """,
    _RECURRENT: """
        npu::_gru_npu npu::_gru_npu_backward npu::_lstm_npu npu::_lstm_npu_backward npu::npu_gru npu::npu_gru_backward
        npu::npu_lstm npu::npu_lstm_backward npu::npu_lstm_cell npu::npu_lstm_cell_backward npu::npu_lstm_data
        npu::npu_lstm_data_backward
    """,
    _SCHEDULING: """
        npu::attention_worker_scheduler npu::attention_worker_scheduler_ npu::ffn_worker_scheduler
        npu::ffn_worker_scheduler_ npu::npu_advance_step_flashattn npu::npu_attention_to_ffn
        npu::npu_attention_update npu::npu_attention_worker_combine npu::npu_batch_gather_matmul
        npu::npu_batch_gather_matmul_ npu::npu_ffn_to_attention npu::npu_ffn_worker_batching
        npu::npu_gather_pa_kv_cache npu::npu_gather_pa_kv_cache_functional npu::npu_mrope
        npu::npu_qkv_rms_norm_rope_cache npu::npu_qkv_rms_norm_rope_cache_functional npu::npu_scatter_list
        npu::npu_scatter_list_ npu::npu_scatter_pa_cache.value npu::npu_top_k_top_p_sample
    """,
    _SUPERSEDED: """
        npu::npu_fused_attention_layernorm_qkv_fwd npu::npu_fused_attention_qkv_grad npu::npu_fused_attention_score
        npu::npu_fused_attention_score_backward npu::npu_fused_attention_score_fwd
        npu::npu_fused_attention_score_grad npu::npu_masked_softmax_with_rel_pos_bias npu::npu_multi_head_attention
        npu::npu_multi_head_attention_backward npu::npu_normalize_batch npu::npu_stride_add
    """,
    _OVERFLOW: "npu::npu_alloc_float_status npu::npu_clear_float_status npu::npu_get_float_status",
    "it updates in place: call its out= form": "npu::npu_apply_adam npu::npu_apply_adam_w npu::npu_bert_apply_adam",
    "its documentation does not say which of its arguments receives what": """
        npu::npu_add_rms_norm_v2 npu::npu_add_rms_norm_v2_functional
    """,
    "it belongs to vocabulary-parallel training": """
        npu::npu_fused_cross_entropy_loss_with_max_sum npu::npu_fused_linear_cross_entropy_loss_with_max_sum_backward
        npu::npu_fused_linear_online_max_sum
    """,
    "it checks the hardware for silent faults": """
        npu::_npu_matmul_abft_verify npu::_npu_silent_check npu::_npu_silent_check_v2 npu::_npu_silent_check_v3
    """,
    "it is torch_npu's obfuscation of weights": "npu::obfuscation_calculate npu::obfuscation_finalize",
    "nested tensors are not supported on the NPU": "aten::to_padded_tensor",
}

REASONS: dict[str, str] = {name: reason for reason, names in _NAMES.items() for name in names.split()}
"""Qualified operator name -> why it is refused."""
