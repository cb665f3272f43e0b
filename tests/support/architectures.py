"""Small random models of many transformers architectures: config, inputs, and checkpoints on disk.

Run with a directory as its argument, it saves all of them there, each in a directory of its name.

Each has a few MiB, with tensors on both sides of 16 KiB (small ones are copied into a process, large ones are mapped),
and weights of a spread that makes every one of them show in the outputs. Relies on transformers 5.16 or newer having
the classes that are named. Checkpoints are equal from run to run under the same versions of torch and transformers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

Inputs = dict[str, "torch.Tensor"]
Kind = Literal["decoder", "experts", "encoder", "encoder-decoder", "vision", "audio", "multimodal", "state-space"]
DType = Literal["float32", "bfloat16"]

VOCABULARY = 512
IMAGE_TOKEN = VOCABULARY - 1
LENGTH = 10
"""Tokens of a text input."""

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_UNTIED = {**_TOKENS, "tie_word_embeddings": False}
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_UNTIED, **_SHAPE, "num_key_value_heads": 2}
_ENCODER = {**_TOKENS, **_SHAPE}
_VISION = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_EXPERTS = {**_GROUPED, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}


def text(config: Any) -> Inputs:
    """Two rows of token ids: of the texts, no special token but the first."""
    ids = _integers(3, min(VOCABULARY - 8, _vocabulary(config)), (2, LENGTH))
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": _ones_like(ids)}


def text_for_both(config: Any) -> Inputs:
    """What an encoder-decoder reads, and how its answer begins."""
    return {**text(config), "decoder_input_ids": _integers(3, VOCABULARY - 8, (2, 4))}


def pixels(config: Any) -> Inputs:
    """Two images."""
    size: int = getattr(config, "image_size", None) or 32
    return {"pixel_values": _normal((2, 3, size, size))}


def text_and_pixels(config: Any) -> Inputs:
    """Two captions, and two images."""
    return {**text(config.text_config), **pixels(config.vision_config)}


def spectrogram(config: Any) -> Inputs:
    """One spectrogram, and how the text begins."""
    frames = 2 * config.max_source_positions
    ids = _integers(3, VOCABULARY - 8, (1, 4))
    return {"input_features": _normal((1, config.num_mel_bins, frames)), "decoder_input_ids": ids}


def waveform(config: Any) -> Inputs:  # noqa: ARG001 - all inputs are made of a config
    """One short piece of sound."""
    return {"input_values": _normal((1, 1600))}


def text_around_image(config: Any) -> Inputs:
    """One row of token ids with one image in it, whose place is as many tokens as it has patches."""
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return {**_around(patches), "pixel_values": _normal((1, 3, *(2 * [config.vision_config.image_size])))}


def text_around_patches(config: Any) -> Inputs:
    """As Qwen2-VL takes an image: patches of two frames as rows, and the grid that they were."""
    import torch

    vision = config.vision_config
    grid = (1, 4, 4)
    row = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    around = _around(16 // vision.spatial_merge_size**2)
    around["input_ids"][0, 2] = config.vision_start_token_id
    kinds = (around["input_ids"] == IMAGE_TOKEN).int()
    return {
        **around,
        "pixel_values": _normal((16, row)),
        "image_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": kinds,
    }


@dataclass(frozen=True)
class Architecture:
    """One model.

    Attributes:
        model: name of the class in ``transformers`` that is saved.
        config: name of its config's class, which is made with ``settings``.
        inputs: makes the inputs of a forward pass; equal from call to call.
        generates: whether ``generate`` takes the same inputs.
        stored: dtype of the checkpoint; the models are loaded in it, and in the other one.
        loaded: name of the class that loads it, where that is another one than ``model``.
        finish: changes the model before it is saved.
    """

    name: str
    kind: Kind
    model: str
    config: str
    settings: dict[str, Any]
    inputs: Callable[[Any], Inputs] = text
    generates: bool = True
    stored: DType = "float32"
    loaded: str = ""
    finish: Callable[[Any], None] = field(default=lambda _: None)

    @property
    def other_dtype(self) -> DType:
        """The dtype that it is not stored in."""
        return "bfloat16" if self.stored == "float32" else "float32"

    def model_class(self) -> Any:
        """The class that loads it."""
        import transformers

        return getattr(transformers, self.loaded or self.model)

    def save(self, directory: Path) -> None:
        """Write its checkpoint, without a tokenizer."""
        import torch
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.settings))
            with torch.no_grad():
                for parameter in model.parameters():
                    _spread(parameter)
                self.finish(model)
        model.to(getattr(torch, self.stored)).save_pretrained(directory)


def _spread(parameter: torch.Tensor) -> None:
    """New values: of matrices, so large that what goes through keeps its size; of vectors, near those that they had."""
    if parameter.dim() > 1:
        summed = parameter[0].numel() if parameter.dim() > 3 else parameter.shape[-1]  # of images: a window
        parameter.normal_(0, 1.5 / summed**0.5)
    else:
        parameter.add_(parameter.new_empty(parameter.shape).uniform_(-0.2, 0.2))


def _make_twins(model: Any) -> None:
    """The second layer gets the values of the first: equal bytes, and yet weights of their own."""
    first, second = model.model.layers
    second.load_state_dict(first.state_dict())


def _generator() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(0)


def _integers(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.randint(low, high, shape, generator=_generator())


def _normal(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=_generator())


def _ones_like(ids: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.ones_like(ids)


def _vocabulary(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _around(places: int) -> Inputs:
    ids = _integers(3, VOCABULARY - 8, (1, LENGTH + places))
    ids[0, 3 : 3 + places] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": _ones_like(ids)}


_CLIP_VISION = {**_VISION, "projection_dim": 64}
_QWEN2_VL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", "decoder", "LlamaForCausalLM", "LlamaConfig", _GROUPED),
    Architecture(
        "llama-tied",
        "decoder",
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_GROUPED, "tie_word_embeddings": True},
        stored="bfloat16",
    ),
    Architecture("llama-twin-layers", "decoder", "LlamaForCausalLM", "LlamaConfig", _GROUPED, finish=_make_twins),
    Architecture(
        "llama-without-head",
        "decoder",
        "LlamaForCausalLM",
        "LlamaConfig",
        _GROUPED,
        generates=False,
        loaded="LlamaModel",
    ),
    Architecture("mistral", "decoder", "MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 8}),
    Architecture("qwen2", "decoder", "Qwen2ForCausalLM", "Qwen2Config", _GROUPED, stored="bfloat16"),
    Architecture("qwen3", "decoder", "Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 32}),
    Architecture(
        "gemma2",
        "decoder",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GROUPED, **_SLIDING, "tie_word_embeddings": True, "head_dim": 32},
    ),
    Architecture(
        "gemma3",
        "decoder",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GROUPED, **_SLIDING, "head_dim": 32},
        stored="bfloat16",
    ),
    Architecture("phi", "decoder", "PhiForCausalLM", "PhiConfig", _GROUPED),
    Architecture("phi3", "decoder", "Phi3ForCausalLM", "Phi3Config", _GROUPED, stored="bfloat16"),
    Architecture(
        "gpt2",
        "decoder",
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_TOKENS, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    Architecture("gpt-neox", "decoder", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_UNTIED, **_SHAPE}),
    Architecture(
        "gpt-j",
        "decoder",
        "GPTJForCausalLM",
        "GPTJConfig",
        {**_UNTIED, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 16},
    ),
    Architecture(
        "bloom",
        "decoder",
        "BloomForCausalLM",
        "BloomConfig",
        {**_TOKENS, "hidden_size": 128, "n_layer": 2, "n_head": 4},
    ),
    Architecture(
        "mpt", "decoder", "MptForCausalLM", "MptConfig", {**_TOKENS, "d_model": 128, "n_heads": 4, "n_layers": 2}
    ),
    Architecture(
        "falcon",
        "decoder",
        "FalconForCausalLM",
        "FalconConfig",
        {**_TOKENS, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        stored="bfloat16",
    ),
    Architecture(
        "opt",
        "decoder",
        "OPTForCausalLM",
        "OPTConfig",
        {**_TOKENS, **_SHAPE, "ffn_dim": 192, "word_embed_proj_dim": 128},
    ),
    Architecture("stablelm", "decoder", "StableLmForCausalLM", "StableLmConfig", _GROUPED),
    Architecture("olmo2", "decoder", "Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    Architecture("cohere", "decoder", "CohereForCausalLM", "CohereConfig", {**_GROUPED, "tie_word_embeddings": True}),
    Architecture("granite", "decoder", "GraniteForCausalLM", "GraniteConfig", _GROUPED, stored="bfloat16"),
    Architecture("smollm3", "decoder", "SmolLM3ForCausalLM", "SmolLM3Config", _GROUPED),
    Architecture("starcoder2", "decoder", "Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    Architecture(
        "mixtral",
        "experts",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        stored="bfloat16",
    ),
    Architecture(
        "qwen2-moe",
        "experts",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    Architecture("qwen3-moe", "experts", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _EXPERTS, stored="bfloat16"),
    Architecture("olmoe", "experts", "OlmoeForCausalLM", "OlmoeConfig", _EXPERTS),
    Architecture(
        "deepseek-v3",
        "experts",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_GROUPED,
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
        {**_GROUPED, **_SLIDING, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
        stored="bfloat16",
    ),
    Architecture("bert", "encoder", "BertForMaskedLM", "BertConfig", _ENCODER, generates=False),
    Architecture(
        "bert-new-head",
        "encoder",
        "BertForMaskedLM",
        "BertConfig",
        _ENCODER,
        generates=False,
        loaded="BertForSequenceClassification",
    ),
    Architecture("roberta", "encoder", "RobertaForMaskedLM", "RobertaConfig", _ENCODER, generates=False),
    Architecture(
        "modernbert",
        "encoder",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**_ENCODER, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        generates=False,
        stored="bfloat16",
    ),
    Architecture(
        "deberta-v2",
        "encoder",
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
        generates=False,
    ),
    Architecture(
        "distilbert",
        "encoder",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {**_TOKENS, "dim": 128, "hidden_dim": 192, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
        generates=False,
    ),
    Architecture(
        "albert",
        "encoder",
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**_ENCODER, "embedding_size": 64},
        generates=False,
        stored="bfloat16",
    ),
    Architecture(
        "t5",
        "encoder-decoder",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **_TOKENS,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 192,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        inputs=text_for_both,
    ),
    Architecture(
        "bart",
        "encoder-decoder",
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **_TOKENS,
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 192,
            "decoder_ffn_dim": 192,
            "max_position_embeddings": 128,
            "decoder_start_token_id": 2,
        },
        inputs=text_for_both,
    ),
    Architecture("vit", "vision", "ViTForImageClassification", "ViTConfig", _VISION, inputs=pixels, generates=False),
    Architecture(
        "dinov2", "vision", "Dinov2Model", "Dinov2Config", _VISION, inputs=pixels, generates=False, stored="bfloat16"
    ),
    Architecture(
        "resnet",
        "vision",
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
        inputs=pixels,
        generates=False,
    ),
    Architecture(
        "clip",
        "vision",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_ENCODER, "projection_dim": 64}, "vision_config": _CLIP_VISION, "projection_dim": 64},
        inputs=text_and_pixels,
        generates=False,
    ),
    Architecture(
        "siglip",
        "vision",
        "SiglipModel",
        "SiglipConfig",
        {"text_config": _ENCODER, "vision_config": _VISION},
        inputs=text_and_pixels,
        generates=False,
        stored="bfloat16",
    ),
    Architecture(
        "whisper",
        "audio",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_TOKENS,
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 192,
            "decoder_ffn_dim": 192,
            "num_mel_bins": 16,
            "max_source_positions": 50,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        inputs=spectrogram,
    ),
    Architecture(
        "wav2vec2",
        "audio",
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **_ENCODER,
            "conv_dim": [32, 32],
            "conv_kernel": [10, 3],
            "conv_stride": [5, 2],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        inputs=waveform,
        generates=False,
    ),
    Architecture(
        "llava",
        "multimodal",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **_CLIP_VISION},
            "image_token_index": IMAGE_TOKEN,
        },
        inputs=text_around_image,
        stored="bfloat16",
    ),
    Architecture(
        "qwen2-vl",
        "multimodal",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**_GROUPED, "rope_parameters": _QWEN2_VL_ROPE},
            "vision_config": {
                "depth": 2,
                "embed_dim": 64,
                "hidden_size": 128,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": IMAGE_TOKEN - 1,
            "vision_start_token_id": IMAGE_TOKEN - 2,
            "vision_end_token_id": IMAGE_TOKEN - 3,
        },
        inputs=text_around_patches,
    ),
    Architecture(
        "mamba",
        "state-space",
        "MambaForCausalLM",
        "MambaConfig",
        {**_TOKENS, "hidden_size": 128, "state_size": 8, "num_hidden_layers": 2},
    ),
    Architecture(
        "mamba2",
        "state-space",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **_TOKENS,
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
            **_GROUPED,
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


def main() -> None:
    for each in ARCHITECTURES:
        each.save(Path(sys.argv[1]) / each.name)


if __name__ == "__main__":
    main()
