"""Publishing: move a loaded model's tensors into the store, segment by segment.

The originals of a segment are freed as soon as it is written, so that the peak over the loaded model is one segment.
The model keeps the addresses at which it wrote when it becomes a reader.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shared_store.base.errors import CommitFailedError, UnsupportedError, WoolyError
from shared_store.base.manifest import Blob, Manifest, encode
from shared_store.client.mapping_phase import mapping_phase
from shared_store.client.session import Session
from shared_store.memory import Backend
from shared_store.protocol import messages
from shared_store.torch.bind import Bound
from shared_store.torch.devices import work_on
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.reach import tensors_from
from shared_store.torch.tensors import NamedTensor, collect, named_tensors
from shared_store.torch.views import StorageKey, storage_key
from shared_store.transfer.copier import copier_for
from shared_store.transfer.digest_check import mismatches, wrong_copy
from shared_store.transfer.rest import Rest
from shared_store.transfer.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """The parts of a manifest beside tensors, see :class:`shared_store.base.manifest.Manifest`."""

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
    """Move a model's tensors into the store, and commit them.

    Args:
        session: was granted the publication; becomes a reader.
        publication: the other parts of the manifest.
        model: loaded and post-processed, on the backend's device.
        backend: of that device.
        min_bytes: smaller storages are published too, but the model keeps its private ones.
        select: True for the named tensors to publish; the others are left alone.
        progress: called with bytes copied since the last call.

    Returns:
        The manifest, the model's mapped segments, and the bytes that are shared and private.

    Raises:
        UnsupportedError: a tensor cannot be shared. The model is unchanged.
        OutOfMemoryError: the model does not fit under the device's limit. The model is unchanged.
        CommitFailedError: the store ended, or refused the commit. The model is complete, and private.
    """
    source = _Source(publication, model, select)
    planned, fds = session.plan(publication.key, source.manifest.blobs, whole=True)
    with mapping_phase(session, backend), contextlib.ExitStack() as failed:
        failed.enter_context(fds)
        existing = sum(not info.promised for info in planned.segments)
        mapped = MappedModel(backend, source.manifest.blobs, planned.places, planned.segments, fds.filenos()[:existing])
        mapped.map_for_reading()
        rest = Rest(planned, fds)
    moved: dict[int, list[torch.Tensor]] = {}
    try:
        for index in range(len(source.ranges)):
            segment = mapped.places[index].segment
            if not mapped.has(segment):
                source.work.reclaim()
                with session.fill(publication.key, mapped.segments[segment].id) as fd, mapping_phase(session, backend):
                    mapped.add(segment, fd.fileno())
            source.move(index, mapped, moved, share=mapped.shared(index, min_bytes))
            progress(source.manifest.blobs[index].nbytes)
        source.work.settle()
        _write_rest(rest, planned, mapped, backend)
        if not backend.host_readable:
            _check_copies(mapped, source)
        with mapping_phase(session, backend):
            mapped.unmap()
        attached, attached_fds = session.commit(source.manifest)
    except WoolyError as error:
        raise CommitFailedError(f"{publication.name} was loaded, but could not be published: {error}") from error
    finally:
        rest.close()
        source.work.settle()
        with mapping_phase(session, backend):
            mapped.map_for_reading()  # also after an error: the model is bound to these addresses
    blobs = source.manifest.blobs
    with attached_fds, mapping_phase(session, backend):
        kept = MappedModel(backend, blobs, attached.places, attached.segments, attached_fds.filenos(), before=mapped)
        kept.map_for_reading()
    _follow(mapped, kept, moved)
    del mapped  # and with it segments that another publisher's replaced
    source.work.reclaim()
    mapped_bytes = sum(blobs[index].nbytes for index in moved)
    tensors = len({entry.alias for entry in source.manifest.tensors})
    return source.manifest, kept, Bound(mapped_bytes, source.manifest.nbytes - mapped_bytes, tensors)


class _Source:
    """A loaded model: its manifest, and its storages with the tensors that use them."""

    def __init__(self, publication: Publication, model: nn.Module, select: Callable[[NamedTensor], bool]) -> None:
        """Describe and digest a model, without changing it. Raises :class:`UnsupportedError`."""
        first = next((named for named in named_tensors(model) if select(named)), None)
        if first is None:
            raise UnsupportedError(f"{publication.name} has no tensors to share")
        self.device = first.tensor.device
        self.work = work_on(self.device)
        self.users: dict[StorageKey | None, list[torch.Tensor]] = defaultdict(list)
        for _, tensor in tensors_from(model):
            self.users[storage_key(tensor)].append(tensor)
            if (base := tensor._base) is not None:  # a view keeps its base, and so the original's memory, alive
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
            raise UnsupportedError(f"the state of {publication.name} cannot be encoded: {error}") from error

    def move(self, index: int, mapped: MappedModel, moved: dict[int, list[torch.Tensor]], *, share: bool) -> None:
        """Copy a storage to its blob if that is new, and if ``share``, put the model's tensors there."""
        found = self.ranges[index]
        if mapped.places[index].new:
            mapped.bytes(index).copy_(found.bytes())
        if share and found.sample.device == self.device:
            moved[index] = self.users.pop(storage_key(found.sample), [])
            _rebind(moved[index], found.start, mapped.bytes(index))
            found.sample = mapped.bytes(index)  # the last reference to the original


def _write_rest(rest: Rest, planned: messages.Planned, mapped: MappedModel, backend: Backend) -> None:
    """Write blobs of other models to segments that return. Raises :class:`DigestMismatchError`."""
    if not planned.rest:
        return
    written = []
    with copier_for(backend) as copier:
        with Workers(copier, "load") as workers:
            for segment in {blob.segment for blob in planned.rest}:
                for span, piece in rest.pieces(segment, mapped.address(segment)):
                    written.append(span)
                    workers.put(piece)
        for digest, actual in mismatches(written, copier).items():
            raise wrong_copy(digest, actual)


def _check_copies(mapped: MappedModel, source: _Source) -> None:
    """Verify the digests of written blobs, for a store that cannot read the device.

    Raises:
        DigestMismatchError: a copy differs from its original.
    """
    written = [index for index, place in enumerate(mapped.places) if place.new]
    found = source.work.digests([mapped.bytes(index) for index in written])
    for index, digest in zip(written, found, strict=True):
        wanted = source.manifest.blobs[index].digest
        if digest != wanted:
            raise wrong_copy(wanted, digest)


def _rebind(tensors: list[torch.Tensor], start: int, blob: torch.Tensor) -> None:
    """Put tensors of one storage onto a blob, which has the storage's bytes from ``start`` on."""
    for tensor in tensors:
        size = tensor.element_size()
        offset = (tensor.storage_offset() * size - start) // size if tensor.numel() else 0
        empty = torch.empty(0, dtype=tensor.dtype, device=blob.device)
        tensor.data = empty.set_(blob.untyped_storage(), offset, tensor.shape, tensor.stride())


def _follow(planned: MappedModel, kept: MappedModel, moved: dict[int, list[torch.Tensor]]) -> None:
    """Use the store's copy of blobs that another publisher committed first, instead of this process's."""
    for index, tensors in moved.items():
        if planned.location(index) != kept.location(index):
            _rebind(tensors, 0, kept.bytes(index))
