"""The loader of an engine that shares its weights, as memory accounting and sleep see it.

They ask two questions: does this engine share, and how many bytes of its models does the store have. The loader itself
imports them, so they know it by this base class only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from wooly_vllm import compat
from wooly_vllm.options import Options


class SharingLoader(ABC):
    """Base class of the loaders that share weights."""

    options: Options

    @abstractmethod
    def resident_bytes(self, vllm_config: Any, model_config: Any, *, in_use: bool = False) -> int:
        """Return the bytes of a committed model on the engine's device; 0 if the store does not have it.

        Args:
            vllm_config: vLLM's.
            model_config: of the model.
            in_use: only what stays there whatever the store needs memory for: of a model with readers, or pinned.

        Raises:
            WoolyError: the store or the checkpoint cannot be read.
        """

    @abstractmethod
    def checkpoint_bytes(self, model_config: Any) -> int:
        """Return the bytes of the files that a model will be loaded from.

        Raises:
            WoolyError: they cannot be found.
        """


def sharing_loader(vllm_config: Any) -> SharingLoader | None:
    """Return a loader of the engine's load format, or None if that format does not share weights."""
    loader = compat.loader_of(vllm_config)
    return loader if isinstance(loader, SharingLoader) else None
