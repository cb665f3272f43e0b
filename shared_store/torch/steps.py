"""The engine's part of loading a shared model: a narrow protocol, and the values that pass through it.

:mod:`shared_store.torch.load` calls the steps, in the order in which :class:`LoadSteps` lists them. Each plugin
implements them once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from shared_store.base.manifest import Manifest
from shared_store.client.identify import Checkpoint
from shared_store.client.session import Session
from shared_store.torch.bind import Bound
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.tensors import NamedTensor

R = TypeVar("R")


@dataclass(frozen=True)
class Identity:
    """The parts of a weight key, and the device of the weights.

    Attributes:
        device: torch's name of it.
        checkpoint: the files whose digest is part of the key.
        facts: every setting that shapes the final tensors, in plain JSON types.
    """

    device: torch.device
    checkpoint: Checkpoint
    facts: dict[str, Any]


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """A loaded model, and the value that the engine's own load function returns for it."""

    model: nn.Module
    result: R


@dataclass(frozen=True)
class Description:
    """Content of a manifest that only the engine knows.

    Attributes:
        state: the engine's plain state, see :class:`shared_store.base.manifest.Manifest`.
        select: True for the named tensors to publish; the others stay private.
    """

    state: dict[str, Any]
    select: Callable[[NamedTensor], bool] = lambda _: True


@dataclass(frozen=True)
class Shared(Generic[R]):
    """A loaded model whose weights are in the store.

    Attributes:
        loaded: the model.
        session: the connection, a reader of the model.
        manifest: the model's manifest.
        mapped: the model's segments in this process.
        bound: bytes that binding or publishing mapped.
        published: True in the publisher, False in a reader that attached.
    """

    loaded: Loaded[R]
    session: Session
    manifest: Manifest
    mapped: MappedModel
    bound: Bound
    published: bool


class LoadSteps(Protocol[R]):
    """The engine-specific steps of one model's load, in the order in which they are called.

    Any step but :meth:`load_stock` and :meth:`bound` may raise a :class:`~shared_store.base.errors.WoolyError` to fall
    back. Any other exception ends the load.
    """

    @property
    def name(self) -> str:
        """The model's name, for logs and the status."""

    @property
    def loads_ahead(self) -> bool:
        """True if :meth:`load_to_publish` may be called before it is known that nobody has the model."""

    def prepare(self) -> None:
        """Check and install all that needs no store. Called before the connection is made."""

    def sharing(self) -> AbstractContextManager[None]:
        """A context for the steps below, except :meth:`load_stock`."""

    def identify(self) -> Identity:
        """Name the device, the checkpoint's files and the facts of the weight key. Reads no weights."""

    def attach(self, manifest: Manifest, mapped: MappedModel) -> tuple[Loaded[R], Bound]:
        """Make the model that a manifest describes, over memory that is mapped for reading."""

    def load_to_publish(self) -> Loaded[R]:
        """Load the stock way, with tensors that can be published."""

    def discard(self, loaded: Loaded[R]) -> None:
        """Drop a model that :meth:`load_to_publish` returned, with its memory: another is attached in its place.

        Only called if :attr:`loads_ahead` is True.
        """

    def describe(self, loaded: Loaded[R]) -> Description:
        """Describe a model that :meth:`load_to_publish` returned, or refuse to publish it."""

    def bound(self, shared: Shared[R]) -> Bound:
        """Finish a model that was attached or published; return what is mapped and what is private now."""

    def left_private(self, loaded: Loaded[R]) -> None:
        """Finish a model that was loaded to be published, and could not be."""

    def load_stock(self) -> R:
        """Load as the engine does without wooly."""
