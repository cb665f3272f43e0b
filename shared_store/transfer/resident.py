"""Resident models: find a committed model by its key, and map it for reading while a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from shared_store.base import manifest as manifests
from shared_store.base.errors import ModelNotFoundError
from shared_store.base.manifest import Manifest
from shared_store.base.status import ModelStatus
from shared_store.client.session import Session
from shared_store.memory import Access, Backend, Mapping
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.transfer.copier import Span

_OPEN_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class ResidentModel:
    """A model mapped for reading. ``spans``: address and size of each distinct blob, by digest."""

    manifest: Manifest
    spans: dict[bytes, Span]


def committed(models: Sequence[ModelStatus], prefix: str) -> ModelStatus:
    """Return the committed model whose key begins with ``prefix``.

    Raises:
        ModelNotFoundError: no model matches, or several do.
    """
    found = [model for model in models if prefix and model.key.startswith(prefix) and model.state == "committed"]
    if not found:
        raise ModelNotFoundError(f"no model with key {prefix} is in the store; `wooly models` lists them")
    if len(found) > 1:
        raise ModelNotFoundError(f"ambiguous key {prefix}: {len(found)} models match; use a longer prefix")
    return found[0]


@contextlib.contextmanager
def mapped(backend: Backend, attached: messages.Attached, fds: OwnedFds) -> Iterator[ResidentModel]:
    """Map the segments of an ``Attached`` reply for reading, and unmap them after the block. Closes the descriptors.

    Raises:
        ProtocolError: the manifest is malformed.
    """
    with contextlib.ExitStack() as mappings:
        addresses: list[int] = []
        with fds:
            for info, fd in zip(attached.segments, fds, strict=True):
                mapping = mappings.enter_context(Mapping(backend, backend.import_fd(fd.fileno(), info.nbytes)))
                mapping.map(Access.READ)
                addresses.append(mapping.address)
        manifest = manifests.decode(attached.manifest)
        spans = {
            blob.digest: (addresses[place.segment] + place.offset, blob.nbytes)
            for blob, place in zip(manifest.blobs, attached.places, strict=True)
        }
        yield ResidentModel(manifest, spans)


@contextlib.contextmanager
def attach(session: Session, model: ModelStatus, backend: Backend) -> Iterator[ResidentModel]:
    """Map a committed model and be one of its readers while the block runs.

    Raises:
        ModelNotFoundError: the model is no longer in the store.
    """
    opened = session.open(
        model.key,
        name=model.name,
        engine=model.engine,
        device=model.device,
        publish=False,
        timeout_s=_OPEN_TIMEOUT_S,
    )
    assert opened is not None  # noqa: S101 - only a client that would publish is granted publication
    attached, fds = opened
    try:
        with mapped(backend, attached, fds) as resident:
            yield resident
    finally:
        if session.alive:
            session.leave(model.key)
