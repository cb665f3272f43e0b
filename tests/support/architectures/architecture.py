"""A small random model of one architecture: its config, its inputs, and how its checkpoint is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from support.architectures.inputs import Inputs, text

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

Kind = Literal["decoder", "experts", "encoder", "encoder-decoder", "vision", "audio", "multimodal", "state-space"]
DType = Literal["float32", "bfloat16"]


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
