"""Inputs of a forward pass, made from a model's config and equal from call to call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from support.architectures.settings import IMAGE_TOKEN, VOCABULARY

if TYPE_CHECKING:
    import torch

Inputs = dict[str, "torch.Tensor"]

LENGTH = 10
"""Tokens of a text input."""


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


def _around(places: int) -> Inputs:
    ids = _integers(3, VOCABULARY - 8, (1, LENGTH + places))
    ids[0, 3 : 3 + places] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": _ones_like(ids)}


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
