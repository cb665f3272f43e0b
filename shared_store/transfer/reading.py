"""A committed model mapped by this process, for as long as a block runs: addresses of its blobs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shared_store.base import manifest as manifests
from shared_store.base.errors import ModelNotFoundError
from shared_store.base.manifest import Manifest
from shared_store.base.status import ModelStatus
from shared_store.client.session import Session
from shared_store.memory import Access, Backend, Mapping
from shared_store.protocol import messages, wire
from shared_store.transfer.copier import Span

_OPENED_WITHIN_S = 60.0


@dataclass(frozen=True)
class Holding:
    """A model, and where each distinct blob of it lies in this process."""

    manifest: Manifest
    spans: dict[bytes, Span]


def committed(models: Sequence[ModelStatus], prefix: str) -> ModelStatus:
    """The one committed model whose key begins so.

    Raises:
        ModelNotFoundError: there is none, or more than one.
    """
    found = [model for model in models if prefix and model.key.startswith(prefix) and model.state == "committed"]
    if not found:
        raise ModelNotFoundError(f"no model with key {prefix} is in the store; `wooly models` lists them")
    if len(found) > 1:
        raise ModelNotFoundError(f"{len(found)} models have keys that begin with {prefix}; give more of it")
    return found[0]


@contextlib.contextmanager
def mapped(backend: Backend, attached: messages.Attached, fds: Sequence[int]) -> Iterator[Holding]:
    """Map an answer of the store for reading, for the block. Takes over the fds."""
    made: list[Mapping] = []
    try:
        try:
            for info, fd in zip(attached.segments, fds, strict=True):
                made.append(Mapping(backend, backend.import_fd(fd, info.nbytes)))
                made[-1].map(Access.READ)
        finally:
            wire.close_fds(fds)
        manifest = manifests.decode(attached.manifest)
        spans = {
            blob.digest: (made[place.segment].address + place.offset, blob.nbytes)
            for blob, place in zip(manifest.blobs, attached.places, strict=True)
        }
        yield Holding(manifest, spans)
    finally:
        for mapping in made:
            mapping.close()


@contextlib.contextmanager
def reading(session: Session, model: ModelStatus, backend: Backend) -> Iterator[Holding]:
    """Be a reader of a model that the store has, for the block.

    Raises:
        ModelNotFoundError: it is gone.
    """
    opened = session.open(
        model.key,
        name=model.name,
        engine=model.engine,
        device=model.device,
        publish=False,
        timeout_s=_OPENED_WITHIN_S,
    )
    assert opened is not None  # noqa: S101 - granted is only who would publish
    try:
        attached, fds = opened
        with mapped(backend, attached, [fd.detach() for fd in fds.detach()]) as holding:
            yield holding
    finally:
        if session.alive:
            session.leave(model.key)


def duplicated(fds: Sequence[int]) -> tuple[int, ...]:
    """Further fds of the same segments, the caller's."""
    made: list[int] = []
    try:
        made.extend(os.dup(fd) for fd in fds)  # close-on-exec, as all that Python opens
    except OSError:
        wire.close_fds(made)
        raise
    return tuple(made)
