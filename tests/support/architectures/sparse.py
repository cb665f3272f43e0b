"""Mixtures of experts, and models with a state instead of attention."""

from __future__ import annotations

from support.architectures.architecture import Architecture
from support.architectures.settings import EXPERTS, GROUPED, SLIDING, TOKENS

SPARSE = (
    Architecture(
        "mixtral",
        "experts",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        stored="bfloat16",
    ),
    Architecture(
        "qwen2-moe",
        "experts",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    Architecture("qwen3-moe", "experts", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS, stored="bfloat16"),
    Architecture("olmoe", "experts", "OlmoeForCausalLM", "OlmoeConfig", EXPERTS),
    Architecture(
        "deepseek-v3",
        "experts",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **GROUPED,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
    Architecture(
        "gpt-oss",
        "experts",
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, **SLIDING, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
        stored="bfloat16",
    ),
    Architecture(
        "mamba",
        "state-space",
        "MambaForCausalLM",
        "MambaConfig",
        {**TOKENS, "hidden_size": 128, "state_size": 8, "num_hidden_layers": 2},
    ),
    Architecture(
        "mamba2",
        "state-space",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **TOKENS,
            "hidden_size": 128,
            "state_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 32,
            "n_groups": 2,
            "chunk_size": 8,
        },
        stored="bfloat16",
    ),
    Architecture(
        "jamba",
        "state-space",
        "JambaForCausalLM",
        "JambaConfig",
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
        },
    ),
)
