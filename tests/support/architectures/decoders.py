"""Decoders: dense ones."""

from __future__ import annotations

from typing import Any

from support.architectures.architecture import Architecture
from support.architectures.settings import GROUPED, SHAPE, SLIDING, TOKENS, UNTIED


def _make_twins(model: Any) -> None:
    """The second layer gets the values of the first: equal bytes, and yet weights of their own."""
    first, second = model.model.layers
    second.load_state_dict(first.state_dict())


DECODERS = (
    Architecture("llama", "decoder", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    Architecture(
        "llama-tied",
        "decoder",
        "LlamaForCausalLM",
        "LlamaConfig",
        {**GROUPED, "tie_word_embeddings": True},
        stored="bfloat16",
    ),
    Architecture("llama-twin-layers", "decoder", "LlamaForCausalLM", "LlamaConfig", GROUPED, finish=_make_twins),
    Architecture(
        "llama-without-head",
        "decoder",
        "LlamaForCausalLM",
        "LlamaConfig",
        GROUPED,
        generates=False,
        loaded="LlamaModel",
    ),
    Architecture("mistral", "decoder", "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 8}),
    Architecture("qwen2", "decoder", "Qwen2ForCausalLM", "Qwen2Config", GROUPED, stored="bfloat16"),
    Architecture("qwen3", "decoder", "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 32}),
    Architecture(
        "gemma2",
        "decoder",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GROUPED, **SLIDING, "tie_word_embeddings": True, "head_dim": 32},
    ),
    Architecture(
        "gemma3",
        "decoder",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GROUPED, **SLIDING, "head_dim": 32},
        stored="bfloat16",
    ),
    Architecture("phi", "decoder", "PhiForCausalLM", "PhiConfig", GROUPED),
    Architecture("phi3", "decoder", "Phi3ForCausalLM", "Phi3Config", GROUPED, stored="bfloat16"),
    Architecture(
        "gpt2",
        "decoder",
        "GPT2LMHeadModel",
        "GPT2Config",
        {**TOKENS, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    Architecture("gpt-neox", "decoder", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**UNTIED, **SHAPE}),
    Architecture(
        "gpt-j",
        "decoder",
        "GPTJForCausalLM",
        "GPTJConfig",
        {**UNTIED, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 16},
    ),
    Architecture(
        "bloom",
        "decoder",
        "BloomForCausalLM",
        "BloomConfig",
        {**TOKENS, "hidden_size": 128, "n_layer": 2, "n_head": 4},
    ),
    Architecture(
        "mpt", "decoder", "MptForCausalLM", "MptConfig", {**TOKENS, "d_model": 128, "n_heads": 4, "n_layers": 2}
    ),
    Architecture(
        "falcon",
        "decoder",
        "FalconForCausalLM",
        "FalconConfig",
        {**TOKENS, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        stored="bfloat16",
    ),
    Architecture(
        "opt",
        "decoder",
        "OPTForCausalLM",
        "OPTConfig",
        {**TOKENS, **SHAPE, "ffn_dim": 192, "word_embed_proj_dim": 128},
    ),
    Architecture("stablelm", "decoder", "StableLmForCausalLM", "StableLmConfig", GROUPED),
    Architecture("olmo2", "decoder", "Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    Architecture("cohere", "decoder", "CohereForCausalLM", "CohereConfig", {**GROUPED, "tie_word_embeddings": True}),
    Architecture("granite", "decoder", "GraniteForCausalLM", "GraniteConfig", GROUPED, stored="bfloat16"),
    Architecture("smollm3", "decoder", "SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    Architecture("starcoder2", "decoder", "Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
)
