from qwen2_npu.conformance.report.labels import STEPS, labels


def test_every_documented_step_has_the_guide_s_name() -> None:
    assert labels() == {
        "original": "原始脚本",
        "fixed_kv_cache": "固定kv cache",
        "flash_attention": "替换FlashAttention&&cos/sin优化",
        "add_rms_norm": "Add+RMSNorm融合",
        "last_token_logits": "全量优化计算量",
        "fused_qkv": "qkv融合",
        "ifa_tiling": "IFA算子计算优化+tiling全下沉",
    }
    assert set(labels()) < set(STEPS)
