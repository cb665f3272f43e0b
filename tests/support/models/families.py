"""Tiny random models, one for each architecture that people serve, for the parity matrix and the tests.

Each has two layers, or the least that exercises its mechanism, and a few MiB of tensors, some larger than 16 KiB and
some smaller: a reader copies small tensors and maps large ones. The models run in vLLM with
``skip_tokenizer_init=True`` and prompt token ids below ``VOCABULARY``. GPU kernels require real head sizes, so models
with multi-head latent attention (MLA) have DeepSeek's.

Relies on the named classes of transformers; weights and tokenizer come from ``random_weights.py``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.models.random_weights import random_checkpoint

VOCABULARY = 2048
"""Vocabulary size of every random model. The tokenizer uses the first 259 ids; image tokens have the next ones."""

_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SPREAD: dict[str, Any] = {"initializer_range": 0.2}
_DECODER: dict[str, Any] = {
    **_TOKENS,
    **_SPREAD,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
# Gemma scales embeddings by sqrt(hidden_size) and normalizes the output of each layer. With an initializer range of
# 0.2, the last token dominates and is repeated. One sliding and one full layer: in Gemma 3, each kind has its own
# rotary table.
_GEMMA: dict[str, Any] = {
    **_DECODER,
    "initializer_range": 0.05,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MLA: dict[str, Any] = {
    **_DECODER,
    "num_key_value_heads": 8,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_IMAGE_TOKENS = ("<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_IMAGE_IDS = {token: 259 + index for index, token in enumerate(_IMAGE_TOKENS)}
_MEAN_AND_SPREAD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


@dataclass(frozen=True)
class Family:
    """A random model and the settings that an engine needs for it.

    Attributes:
        model_class: Name of a model class of transformers.
        config_class: Name of its configuration class.
        config: Arguments of the configuration.
        embeddings: Factor applied to the weights of the input embeddings.
        tokens: Special tokens in addition to the tokenizer's own.
        files: Content of the JSON files that the model's processor reads, by name.
        renamed: Pattern and replacement for tensor names. Real checkpoints may have older names than transformers
            saves, and vLLM reads only those.
        sparse: True for a mixture-of-experts model.
        embeds: True for a model whose output is an embedding.
    """

    model_class: str
    config_class: str
    config: dict[str, Any]
    embeddings: float = 1.0
    tokens: tuple[str, ...] = ()
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    renamed: tuple[str, str] | None = None
    sparse: bool = False
    embeds: bool = False

    def make(self, cache: Path, name: str) -> Path:
        """Return the checkpoint directory in ``cache``; make it if it does not exist."""
        import transformers

        model_class = getattr(transformers, self.model_class)
        config = getattr(transformers, self.config_class)(**self.config)
        return random_checkpoint(
            cache, name, model_class, config, tokens=self.tokens, embeddings=self.embeddings, finish=self._finish
        )

    def _finish(self, directory: Path) -> None:
        for name, content in self.files.items():
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if self.renamed is not None:
            from safetensors.torch import load_file, save_file

            file = directory / "model.safetensors"
            tensors = {re.sub(*self.renamed, name): tensor for name, tensor in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})


def _decoder(**changes: Any) -> dict[str, Any]:
    return {**_DECODER, **changes}


DENSE: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "llama-tied": Family("LlamaForCausalLM", "LlamaConfig", _decoder(tie_word_embeddings=True)),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _decoder(head_dim=32)),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _decoder(original_max_position_embeddings=512)),
    # Embeddings are always tied. Unless they are small, the last token is the most likely next one.
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GEMMA, **_SPREAD, "tie_word_embeddings": True},
        embeddings=0.05,
    ),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_TOKENS, **_SPREAD, "n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 512},
    ),
    "gpt-neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER),
    "bloom": Family(
        "BloomForCausalLM", "BloomConfig", {**_TOKENS, **_SPREAD, "hidden_size": 256, "n_layer": 2, "n_head": 8}
    ),
    "mpt": Family(
        "MptForCausalLM",
        "MptConfig",
        {**_TOKENS, **_SPREAD, "d_model": 256, "n_layers": 2, "n_heads": 8, "expansion_ratio": 2, "max_seq_len": 512},
    ),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        _decoder(num_kv_heads=2, new_decoder_architecture=True, tie_word_embeddings=True),
    ),
    "mamba": Family(
        "MambaForCausalLM",
        "MambaConfig",
        {**_TOKENS, **_SPREAD, "hidden_size": 256, "state_size": 16, "num_hidden_layers": 2, "time_step_rank": 16},
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **_TOKENS,
            **_SPREAD,
            "hidden_size": 256,
            "state_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 64,
            "n_groups": 2,
            "chunk_size": 64,
        },
    ),
    "qwen2-vl": Family(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": _decoder(
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
            ),
            "vision_config": {
                "depth": 2,
                "embed_dim": 128,
                "hidden_size": 256,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 14,
                **_SPREAD,
            },
            "image_token_id": _IMAGE_IDS["<|image_pad|>"],
            "video_token_id": _IMAGE_IDS["<|video_pad|>"],
            "vision_start_token_id": _IMAGE_IDS["<|vision_start|>"],
            "vision_end_token_id": _IMAGE_IDS["<|vision_end|>"],
            "tie_word_embeddings": False,
        },
        tokens=_IMAGE_TOKENS,
        files={
            "preprocessor_config.json": {
                "processor_class": "Qwen2VLProcessor",
                "image_processor_type": "Qwen2VLImageProcessor",
                "min_pixels": 56 * 56,
                "max_pixels": 112 * 112,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                **_MEAN_AND_SPREAD,
            },
        },
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 56,
                "patch_size": 14,
                "projection_dim": 128,
                **_SPREAD,
            },
            "image_token_index": _IMAGE_IDS["<image>"],
            "vision_feature_layer": -1,
            "tie_word_embeddings": False,
        },
        tokens=_IMAGE_TOKENS,
        files={
            "preprocessor_config.json": {
                "processor_class": "LlavaProcessor",
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 56},
                "crop_size": {"height": 56, "width": 56},
                **_MEAN_AND_SPREAD,
            },
            "processor_config.json": {
                "processor_class": "LlavaProcessor",
                "patch_size": 14,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
                "image_token": "<image>",
            },
        },
        renamed=(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    ),
    "bert": Family(
        "BertModel",
        "BertConfig",
        {
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            **_SPREAD,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "max_position_embeddings": 512,
        },
        embeds=True,
    ),
}
"""Dense models, by name."""

SPARSE: dict[str, Family] = {
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", _decoder(num_local_experts=4, num_experts_per_tok=2), sparse=True
    ),
    "qwen3-moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _decoder(head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True),
        sparse=True,
    ),
    "deepseek-v2": Family(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**_MLA, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
        sparse=True,
    ),
    "deepseek-v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_MLA,
            "q_lora_rank": 256,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "n_group": 2,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        },
        sparse=True,
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        _decoder(
            intermediate_size=256,
            head_dim=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        ),
        sparse=True,
    ),
    "jamba": Family(
        "JambaForCausalLM",
        "JambaConfig",
        _decoder(
            num_experts=4,
            num_experts_per_tok=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_dt_rank=16,
        ),
        sparse=True,
    ),
}
"""Mixture-of-experts models, by name."""

FAMILIES: dict[str, Family] = {**DENSE, **SPARSE}
"""All random models, by name."""

COMMON = ("llama", "llama-tied", "qwen2", "qwen3", "gemma3", "gpt2", "bloom", "mixtral")
"""Names of the models that most tests with engines use."""


def random_model(name: str, cache: Path) -> Path:
    """Return the checkpoint directory of one of ``FAMILIES``; make it in ``cache`` if it does not exist."""
    return FAMILIES[name].make(cache, name)
