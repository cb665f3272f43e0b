"""The host copy: the blobs of a sleeping model in host memory, as a model of the device ``cpu``.

All processes in which the model sleeps share one host copy. Its key is derived from the model's key and its blobs'
digests. A segment in host memory is a file, so copies use the same code as saved models.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Final

import msgspec

from shared_store.base import manifest as manifests
from shared_store.base.errors import DigestMismatchError
from shared_store.base.keys import host_key
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.sleep.model import Model
from shared_store.transfer.copier import Piece, Progress, Span, copier_for, ignore_progress
from shared_store.transfer.digest_check import wrong_copy
from shared_store.transfer.files import OpenFile
from shared_store.transfer.workers import Workers

HOST: Final = "cpu"


class HostCopy:
    """An open host copy, the source of its blobs. Closes its descriptors when closed or collected."""

    def __init__(self, key: str, attached: messages.Attached, fds: OwnedFds) -> None:
        """Take over the descriptors of the segments, also if this raises.

        Raises:
            ProtocolError: the manifest is malformed.
        """
        self.key = key
        with contextlib.ExitStack() as owned:
            owned.enter_context(fds)
            self.manifest = manifests.decode(attached.manifest)
            files = [owned.enter_context(OpenFile(self.manifest.name, fd)) for fd in fds.detach()]
            self._locations = {
                blob.digest: (files[place.segment], place.offset)
                for blob, place in zip(self.manifest.blobs, attached.places, strict=True)
            }
            self._close = weakref.finalize(self, owned.pop_all().close)

    def piece(self, digest: bytes, span: Span) -> Piece:
        """Return the copy of a blob from its segment to a span of device memory."""
        return Piece(*self._locations[digest], *span)

    def mismatch(self, digest: bytes, actual: bytes) -> DigestMismatchError:
        """Return the error for a blob whose copy on the device has another digest."""
        return wrong_copy(digest, actual)

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        self._close()


def open_host_copy(model: Model, spans: Sequence[Span], progress: Progress = ignore_progress) -> HostCopy:
    """Attach to the host copy of a model, or make it. This process is a reader of it afterwards.

    Args:
        model: the model, mapped on its device.
        spans: address and size of each blob on the device, in the manifest's order.
        progress: called with bytes copied.

    Raises:
        OutOfMemoryError: host memory, or the store's limit for it, is too small.
        DigestMismatchError: bytes on the device, or in an existing host copy, do not match the model's digests.
        StoreUnavailableError: there is no store.
    """
    key = host_key(model.manifest.key, (blob.digest for blob in model.manifest.blobs))
    name = f"{model.manifest.name} (host copy)"
    opened = model.open(key, HOST, name)
    if opened is None:
        manifest = msgspec.structs.replace(model.manifest, key=key, device=HOST, name=name)
        with model.publication(key):
            opened = _publish(model, manifest, spans, progress)
    try:
        host = HostCopy(key, *opened)
    except BaseException:
        model.leave(key)
        raise
    if host.manifest.blobs != model.manifest.blobs:
        host.close()
        model.leave(key)
        raise DigestMismatchError(f"the host copy of {model.manifest.name} has other blobs than the model")
    return host


def _publish(
    model: Model, manifest: manifests.Manifest, spans: Sequence[Span], progress: Progress
) -> tuple[messages.Attached, OwnedFds]:
    """Copy the mapped blobs to host memory and publish them. The store checks the digests on commit."""
    session = model.session
    planned, fds = session.plan(manifest.key, manifest.blobs)
    fds.close()  # existing segments are not needed: nothing is written to them
    with contextlib.ExitStack() as opened:
        files: dict[int, OpenFile] = {}
        with copier_for(model.backend) as copier, Workers(copier, "save", progress) as workers:
            for place, span in zip(planned.places, spans, strict=True):
                if not place.new:
                    continue
                if place.segment not in files:
                    fd = session.fill(manifest.key, planned.segments[place.segment].id)
                    files[place.segment] = opened.enter_context(OpenFile("a segment in host memory", fd))
                workers.put(Piece(files[place.segment], place.offset, *span))
    return session.commit(manifest)
