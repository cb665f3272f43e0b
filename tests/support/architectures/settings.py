"""Settings that configs of several architectures share: small shapes, and one vocabulary."""

from __future__ import annotations

VOCABULARY = 512
IMAGE_TOKEN = VOCABULARY - 1

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNTIED = {**TOKENS, "tie_word_embeddings": False}
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**UNTIED, **SHAPE, "num_key_value_heads": 2}
ENCODER = {**TOKENS, **SHAPE}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
EXPERTS = {**GROUPED, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
CLIP_VISION = {**VISION, "projection_dim": 64}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
