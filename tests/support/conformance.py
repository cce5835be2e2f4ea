"""The real checkpoints of tests/conformance/checkpoints, and the model in each: the name of its expected results."""

CHECKPOINTS = {
    "llama_core_0_16_tp2pp2": "llama",
    "llama_main_2026_08_tp4": "llama",
    "gpt2_core_0_16_tp2": "gpt2",
    "llama_legacy_core_0_16_pp2vpp2": "llama",
    "gpt2_legacy_core_0_16_tp2": "gpt2",
    "mixtral_core_0_16_pp2ep2": "mixtral",
    "llama_3_2_core_0_16_tp2": "llama_3_2",
    "mistral_core_0_16_tp2": "mistral",
    "qwen2_core_0_16_tp2": "qwen2",
    "qwen2_moe_core_0_16_tp2": "qwen2_moe",
    "qwen3_core_0_16_tp2": "qwen3",
    "qwen3_moe_core_0_16_tp2": "qwen3_moe",
    "starcoder2_core_0_16_tp2": "starcoder2",
    "starcoder_core_0_16_tp2": "starcoder",
    "deepseek_v3_core_0_16": "deepseek_v3",
    "moonlight_core_0_16_tp2": "moonlight",
    "deepseek_v2_core_0_16": "deepseek_v2",
    "deepseek_v2_groups_core_0_16": "deepseek_v2_groups",
    "deepseek_v2_lite_core_0_16": "deepseek_v2_lite",
    "decilm_core_0_16": "decilm",
    "gpt_oss_core_0_16": "gpt_oss",
    "gemma_bridge_core_0_16_tp2": "gemma",
    "gemma2_bridge_core_0_16_tp2": "gemma2",
    "falcon_7b_nemo1_core_0_16_tp2": "falcon_7b",
    "falcon_40b_nemo1_core_0_16_tp2": "falcon_40b",
}

WITHOUT_ENGINE = frozenset({"deepseek_v3", "moonlight", "deepseek_v2", "gpt_oss"})
"""Models that no class of TensorRT-LLM is exported for."""
