"""vLLM's default loader, recording which files it reads and which state the load changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from wooly_vllm import compat
from wooly_vllm.loading import methods, state

DefaultModelLoader: Any = compat.find("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader")[0]


class InnerLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's loader of checkpoints.

    Attributes:
        before: plain state of the model before its weights were loaded.
        read: paths of all weight files that were named so far.
        left_behind: paths of unnamed tensors that the load changed, see :class:`~wooly_vllm.loading.state.Unnamed`.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self.before: state.Plain = {}
        self.read: set[Path] = set()
        self.left_behind: list[str] = []

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load weights into a model, and compare its state with that before."""
        self.before = state.plain_state(model)
        unnamed = state.Unnamed(model)
        super().load_weights(model, model_config)
        self.left_behind = unnamed.changed(model, methods.rehearsed_layers(model).values())

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_weights(*args, **kwargs)
        self.read.update(Path(file) for file in prepared[1])
        return prepared
