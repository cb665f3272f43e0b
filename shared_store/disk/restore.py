"""Restoring: publish a saved model in the store, under its own key.

Only blobs that are not in the store are read: several threads copy them into the segments, each as soon as the store
allocated it. Their digests are checked on the device before the commit. In host memory the store checks them again.
"""

from __future__ import annotations

import contextlib
import time
from typing import Final, Literal

import msgspec

from shared_store.base.errors import WoolyError
from shared_store.client.session import Session
from shared_store.disk.saved import SavedModel
from shared_store.memory import Backend, backend_for
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.transfer.copier import Progress, copier_for, ignore_progress
from shared_store.transfer.fill import fill_promised, new_blobs
from shared_store.transfer.rest import Rest

PUBLISH_TIMEOUT_S: Final = 1800.0
"""Seconds that another client may take to publish the same model."""


def restore(
    session: Session, saved: SavedModel, backend: Backend, progress: Progress = ignore_progress
) -> tuple[messages.Attached, OwnedFds]:
    """Publish a saved model and become its reader.

    Args:
        session: the connection; it was granted publication of the model's key.
        saved: the saved model.
        backend: the backend of the device that publication was granted for.
        progress: called with bytes read.

    Returns:
        The store's description of the model, and a descriptor of each segment.

    Raises:
        SavedModelError: a file changed. As after every error, the caller aborts the publication, and no bytes that were
            read become visible.
        OutOfMemoryError: the device has too little memory.
    """
    manifest = msgspec.structs.replace(saved.manifest, device=backend.device)
    with copier_for(backend) as copier:
        planned, fds = session.plan(manifest.key, manifest.blobs, whole=True)
        with contextlib.closing(Rest(planned, fds)) as rest:
            contents = new_blobs(manifest.blobs, planned)
            fill_promised(session, manifest.key, planned, contents, saved, backend, copier, progress, rest)
    return session.commit(manifest)


class Restored(msgspec.Struct, frozen=True):
    """The result of a restore. ``resident``: the model was in the store already, and nothing was read."""

    key: str
    name: str
    device: str
    result: Literal["restored", "resident"]
    bytes_read: int
    seconds: float


def restore_resident(
    session: Session, saved: SavedModel, device: str, progress: Progress = ignore_progress
) -> Restored:
    """Make a saved model resident, without keeping it in use. Waits if another client publishes it.

    Args:
        session: the connection.
        saved: the saved model.
        device: ``cpu``, or a GPU's UUID.
        progress: called with bytes read.

    Raises:
        TimedOutError: another client did not finish publishing it within :data:`PUBLISH_TIMEOUT_S`.
        UnknownDeviceError: this process has no such device.
        WoolyError: as :func:`restore` raises; the publication was aborted.
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
        timeout_s=PUBLISH_TIMEOUT_S,
    )
    result: Literal["restored", "resident"] = "resident" if opened else "restored"
    try:
        _, fds = opened or restore(session, saved, backend, count)
    except BaseException:
        if session.alive:
            with contextlib.suppress(WoolyError):  # the first error is the one to report
                session.abandon(manifest.key, "a saved model could not be restored")
        raise
    fds.close()
    session.leave(manifest.key)
    return Restored(manifest.key, manifest.name, device, result, sum(read), time.perf_counter() - began)
