"""A host copy that is a model of its own, on the device ``cpu``: where segments have no host copies.

That is so in stores of earlier versions, and for a process that has its own copy of a whole model (it woke up in
private memory) or whose model was withdrawn. The key of the copy is derived from the model's key and its blobs'
digests. The process reads the copy while it sleeps, and does not read the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec

from shared_store.base import manifest as manifests
from shared_store.base.errors import DigestMismatchError
from shared_store.base.keys import host_key
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.sleep.host_copy import HostCopy
from shared_store.sleep.model import NO_STORE, Model
from shared_store.transfer.copier import Piece, Progress, Span, copier_for, ignore_progress
from shared_store.transfer.files import OpenFile
from shared_store.transfer.workers import Workers

HOST = "cpu"


class CopiedModel(HostCopy):
    """An open model of the device ``cpu`` with the blobs of another model."""

    def __init__(self, key: str, attached: messages.Attached, fds: OwnedFds) -> None:
        """Take over the descriptors of the segments, also if this raises.

        Raises:
            ProtocolError: the manifest is malformed.
        """
        self.key = key
        with contextlib.ExitStack() as failed:
            failed.enter_context(fds)
            manifest = manifests.decode(attached.manifest)
            failed.pop_all()
        super().__init__(manifest, attached.places, fds)

    def go_away(self, model: Model, private_bytes: int) -> None:  # noqa: D102 - documented by the interface
        model.leave(model.manifest.key)
        with contextlib.suppress(*NO_STORE):  # the report only serves the status
            model.session.report(self.key, private_bytes)

    def leave(self, model: Model) -> None:  # noqa: D102 - documented by the interface
        self.close()
        model.leave(self.key)


def copy_model(model: Model, spans: Sequence[Span], progress: Progress = ignore_progress) -> CopiedModel:
    """Attach to the copy of a model, or publish it. This process is a reader of it afterwards.

    Args:
        model: the model, mapped on its device.
        spans: address and size of each blob on the device, in the manifest's order.
        progress: called with bytes copied.

    Raises:
        OutOfMemoryError: host memory, or the store's limit for it, is too small.
        DigestMismatchError: bytes on the device, or in an existing copy, do not match the model's digests.
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
        host = CopiedModel(key, *opened)
    except BaseException:
        model.leave(key)
        raise
    if host.manifest.blobs != model.manifest.blobs:
        host.leave(model)
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
