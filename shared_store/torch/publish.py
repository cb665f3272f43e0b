"""Publishing: a loaded model's tensors move into the store, segment by segment, and the model with them.

The originals of a segment are freed as soon as it is full, so that the peak over the loaded model is one segment. The
addresses that the model is bound to while it writes are those that it keeps as a reader.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shared_store.base.errors import CommitFailedError, DigestMismatchError, UnsupportedError, WoolyError
from shared_store.base.manifest import Blob, Manifest, encode
from shared_store.client.session import Session
from shared_store.memory import Backend
from shared_store.torch.bind import Bound
from shared_store.torch.devices import work_on
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.reach import tensors_from
from shared_store.torch.tensors import NamedTensor, collect, named_tensors
from shared_store.torch.views import StorageKey, storage_key

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """What is published, and under which key. ``state``: see :class:`shared_store.base.manifest.Manifest`."""

    key: str
    name: str
    engine: str
    device: str
    state: dict[str, Any]


def publish(
    session: Session,
    publication: Publication,
    model: nn.Module,
    backend: Backend,
    *,
    min_bytes: int,
    select: Callable[[NamedTensor], bool] = lambda _: True,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Manifest, MappedModel, Bound]:
    """Move a model's tensors into the store. The session must have been granted the key.

    Args:
        session: the connection, which becomes the model's reader.
        publication: what to call it.
        model: loaded and post-processed, on the backend's device.
        backend: of that device.
        min_bytes: storages below this size are published, but the model keeps its own.
        select: which of the model's named tensors to publish; the others stay as they are.
        progress: called with bytes copied since the last call.

    Raises:
        UnsupportedError: a tensor cannot be shared. The model is as it was.
        OutOfMemoryError: the store has no room. The model is as it was.
        CommitFailedError: the store is gone or refused the result. The model is whole, and private.
    """
    source = _Source(publication, model, select)
    planned, fds = session.plan(publication.key, source.manifest.blobs)
    with fds:
        mapped = MappedModel(backend, source.manifest.blobs, planned.places, planned.segments, fds.filenos())
    mapped.map_for_reading()
    moved: dict[int, list[torch.Tensor]] = {}
    try:
        for index in range(len(source.ranges)):
            segment = mapped.places[index].segment
            if not mapped.has(segment):
                source.work.reclaim()
                with session.fill(publication.key, mapped.segments[segment].id) as fd:
                    mapped.add(segment, fd.fileno())
            source.move(index, mapped, moved, share=mapped.shared(index, min_bytes))
            progress(source.manifest.blobs[index].nbytes)
        source.work.settle()
        if not backend.host_readable:
            _check_copies(mapped, source)
        mapped.unmap()
        attached, attached_fds = session.commit(source.manifest)
    except WoolyError as error:
        raise CommitFailedError(f"{publication.name} was loaded, but the store did not take it: {error}") from error
    finally:
        source.work.settle()
        mapped.map_for_reading()  # whatever happened, the model needs what it is bound to
    blobs = source.manifest.blobs
    with attached_fds:
        kept = MappedModel(backend, blobs, attached.places, attached.segments, attached_fds.filenos(), before=mapped)
    _follow(mapped, kept, moved)
    del mapped  # and with it segments that were written in vain
    source.work.reclaim()
    mapped_bytes = sum(blobs[index].nbytes for index in moved)
    tensors = len({entry.alias for entry in source.manifest.tensors})
    return source.manifest, kept, Bound(mapped_bytes, source.manifest.nbytes - mapped_bytes, tensors)


class _Source:
    """A loaded model as what is to be published: its manifest, its storages, and who uses them."""

    def __init__(self, publication: Publication, model: nn.Module, select: Callable[[NamedTensor], bool]) -> None:
        """Describe and digest a model; nothing is changed. Raises :class:`UnsupportedError`."""
        first = next((named for named in named_tensors(model) if select(named)), None)
        if first is None:
            raise UnsupportedError(f"{publication.name} has no tensors to share")
        self.device = first.tensor.device
        self.work = work_on(self.device)
        self.users: dict[StorageKey | None, list[torch.Tensor]] = defaultdict(list)
        for _, tensor in tensors_from(model):
            self.users[storage_key(tensor)].append(tensor)
            if (base := tensor._base) is not None:  # a view keeps what it was made of, and so the original's memory
                self.users[storage_key(base)].append(base)
        others = (tensor for tensors in self.users.values() for tensor in tensors)
        collection = collect(model, self.device, others, select=select)
        self.ranges = collection.ranges
        data = [found.bytes().to(self.device) for found in self.ranges]
        digests = self.work.digests(data)
        self.manifest = Manifest(
            key=publication.key,
            name=publication.name,
            engine=publication.engine,
            device=publication.device,
            blobs=tuple(Blob(found, part.numel()) for found, part in zip(digests, data, strict=True)),
            tensors=collection.entries,
            state=publication.state,
        )
        try:
            encode(self.manifest)
        except (OverflowError, TypeError, ValueError) as error:  # before anything moves
            raise UnsupportedError(f"the state of {publication.name} cannot be written down: {error}") from error

    def move(self, index: int, mapped: MappedModel, moved: dict[int, list[torch.Tensor]], *, share: bool) -> None:
        """Copy a storage to its blob, if that is new, and put the model's tensors there, if they are to be shared."""
        found = self.ranges[index]
        if mapped.places[index].new:
            mapped.bytes(index).copy_(found.bytes())
        if share and found.sample.device == self.device:
            moved[index] = self.users.pop(storage_key(found.sample), [])
            _rebind(moved[index], found.start, mapped.bytes(index))
            found.sample = mapped.bytes(index)  # the last reference to the original


def _check_copies(mapped: MappedModel, source: _Source) -> None:
    """Digest what was written, where the store cannot do it.

    Raises:
        DigestMismatchError: a copy is not what it is a copy of.
    """
    written = [index for index, place in enumerate(mapped.places) if place.new]
    found = source.work.digests([mapped.bytes(index) for index in written])
    for index, digest in zip(written, found, strict=True):
        wanted = source.manifest.blobs[index].digest
        if digest != wanted:
            raise DigestMismatchError(f"the copy of blob {wanted.hex()[:16]} has digest {digest.hex()[:16]}")


def _rebind(tensors: list[torch.Tensor], start: int, blob: torch.Tensor) -> None:
    """Put tensors of one storage onto a blob that has the storage's bytes from ``start`` on."""
    for tensor in tensors:
        size = tensor.element_size()
        offset = (tensor.storage_offset() * size - start) // size if tensor.numel() else 0
        empty = torch.empty(0, dtype=tensor.dtype, device=blob.device)
        tensor.data = empty.set_(blob.untyped_storage(), offset, tensor.shape, tensor.stride())


def _follow(planned: MappedModel, kept: MappedModel, moved: dict[int, list[torch.Tensor]]) -> None:
    """Where another publisher brought the same blob first, the store kept that copy: use it, and free ours."""
    kept.map_for_reading()
    for index, tensors in moved.items():
        if planned.where(index) != kept.where(index):
            _rebind(tensors, 0, kept.bytes(index))
