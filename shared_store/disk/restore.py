"""Bringing a saved model back into the store, under its key, by whoever was granted its publication.

Only blobs that the store does not have are read: into the store's memory by several threads, segment by segment as it
is allocated. Their digests are checked there before the commit; where the host can read memory, the store checks them
again.
"""

from __future__ import annotations

import contextlib
import time
from typing import Final, Literal

import msgspec

from shared_store.base.errors import SavedModelError, WoolyError
from shared_store.base.manifest import Manifest
from shared_store.client.session import Session
from shared_store.disk.saved import SavedModel
from shared_store.memory import Backend, backend_for
from shared_store.memory.mapping import map_writable
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.transfer.copier import Copier, Piece, Progress, Span, copier_for, unheard
from shared_store.transfer.workers import Workers

WAIT_S: Final = 1800.0
"""Seconds that another client may take to publish the same model."""


def restore(
    session: Session, saved: SavedModel, backend: Backend, progress: Progress = unheard
) -> tuple[messages.Attached, OwnedFds]:
    """Publish a saved model. The session must have been granted its key, and becomes its reader.

    Args:
        session: the connection.
        saved: what to bring back.
        backend: of the device that it was granted for.
        progress: called with bytes read.

    Returns:
        The store's answer, and descriptors of the segments.

    Raises:
        SavedModelError: the files are not what was saved. As after every error, the publication is still the session's,
            to be abandoned; nothing that was read can be had by anybody.
        OutOfMemoryError: the store has no room.
    """
    manifest = msgspec.structs.replace(saved.manifest, device=backend.device)
    with copier_for(backend) as copier:
        _fill(session, saved, manifest, backend, copier, progress)
    return session.commit(manifest)


def _fill(
    session: Session, saved: SavedModel, manifest: Manifest, backend: Backend, copier: Copier, progress: Progress
) -> None:
    """Read the blobs that are new to the store, and check them. Nothing stays mapped."""
    planned, fds = session.plan(manifest.key, manifest.blobs)
    fds.close()  # of segments that exist: this process need not see them
    wanted: dict[int, list[tuple[bytes, int]]] = {}
    for blob, place in zip(manifest.blobs, planned.places, strict=True):
        if place.new:
            wanted.setdefault(place.segment, []).append((blob.digest, place.offset))
    spans: dict[bytes, Span] = {}
    with contextlib.ExitStack() as mapped:
        with Workers(copier, "load", progress) as workers:
            for number, info in enumerate(planned.segments):
                if not info.promised:
                    continue
                address = mapped.enter_context(map_writable(backend, session.fill(manifest.key, info.id), info.nbytes))
                for digest, offset in wanted.get(number, ()):
                    stored = saved.places[digest]
                    spans[digest] = (address + offset, stored.bytes)
                    workers.put(Piece(saved.files[stored.file], stored.offset, *spans[digest]))
        found = copier.digests(list(spans.values()))
        for digest, actual in zip(spans, found, strict=True):
            if actual != digest:
                stored = saved.places[digest]
                raise SavedModelError(
                    f"{saved.files[stored.file].name} was changed: its {stored.bytes} bytes from {stored.offset} on "
                    f"have digest {actual.hex()[:16]}, and were saved with {digest.hex()[:16]}"
                )


class Restored(msgspec.Struct, frozen=True):
    """What became of a saved model. ``resident``: the store had it; nothing was read."""

    key: str
    name: str
    device: str
    result: Literal["restored", "resident"]
    bytes_read: int
    seconds: float


def restore_resident(session: Session, saved: SavedModel, device: str, progress: Progress = unheard) -> Restored:
    """Bring a saved model back for whoever wants it later; where somebody publishes it, wait for that.

    Raises as :func:`restore` does, and :class:`TimedOutError`.
    """
    began = time.perf_counter()
    manifest, backend = saved.manifest, backend_for(device)
    read: list[int] = []

    def count(nbytes: int) -> None:
        read.append(nbytes)
        progress(nbytes)

    opened = session.open(
        manifest.key,
        name=manifest.name,
        engine=manifest.engine,
        device=device,
        publish=True,
        timeout_s=WAIT_S,
    )
    result: Literal["restored", "resident"] = "resident" if opened else "restored"
    try:
        _, fds = opened or restore(session, saved, backend, count)
    except BaseException:
        if session.alive:
            with contextlib.suppress(WoolyError):  # the first error is the one to tell
                session.abandon(manifest.key, "a saved model could not be restored")
        raise
    fds.close()
    session.leave(manifest.key)
    return Restored(manifest.key, manifest.name, device, result, sum(read), time.perf_counter() - began)
