"""Models of images, of sound, and of text with images."""

from __future__ import annotations

from support.architectures.architecture import Architecture
from support.architectures.inputs import (
    pixels,
    spectrogram,
    text_and_pixels,
    text_around_image,
    text_around_patches,
    waveform,
)
from support.architectures.settings import CLIP_VISION, ENCODER, GROUPED, IMAGE_TOKEN, TOKENS, VISION

_QWEN2_VL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}

MODALITIES = (
    Architecture("vit", "vision", "ViTForImageClassification", "ViTConfig", VISION, inputs=pixels, generates=False),
    Architecture(
        "dinov2", "vision", "Dinov2Model", "Dinov2Config", VISION, inputs=pixels, generates=False, stored="bfloat16"
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
        {"text_config": {**ENCODER, "projection_dim": 64}, "vision_config": CLIP_VISION, "projection_dim": 64},
        inputs=text_and_pixels,
        generates=False,
    ),
    Architecture(
        "siglip",
        "vision",
        "SiglipModel",
        "SiglipConfig",
        {"text_config": ENCODER, "vision_config": VISION},
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
            **TOKENS,
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
            **ENCODER,
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
            "text_config": {"model_type": "llama", **GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **CLIP_VISION},
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
            "text_config": {**GROUPED, "rope_parameters": _QWEN2_VL_ROPE},
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
)
