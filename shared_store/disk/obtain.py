"""Obtaining a model without loading it: attach to it in the store, or restore a saved model.

A model in the store is attached to, and verified first with ``WOOLY_VERIFY=attach``. If the store grants publication
instead, a saved model is restored: from the directory that the engine names, otherwise from the cache. If there is no
saved model, or it is refused, the engine loads the model itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from shared_store.base import envs
from shared_store.base.errors import DigestMismatchError, SavedModelError, WoolyError
from shared_store.client.session import Session
from shared_store.disk.cache import Cache, available
from shared_store.disk.restore import restore
from shared_store.disk.saved import SavedModel
from shared_store.memory import Backend
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.transfer.copier import Progress, copier_for, ignore_progress
from shared_store.transfer.resident import mapped
from shared_store.transfer.verify import mismatched, quarantine

log = logging.getLogger(__name__)

_ATTEMPTS: Final = 4
"""Times that the model is opened. After each, wrong bytes are quarantined or a saved model is refused."""

ProgressBar: TypeAlias = Callable[[str, int], AbstractContextManager[Progress]]
"""Makes a progress bar from a title and a number of bytes."""

Opened: TypeAlias = tuple[messages.Attached, OwnedFds]
"""The store's description of a model, and a descriptor of each segment."""


@dataclass(frozen=True)
class Need:
    """A model that an engine needs.

    Attributes:
        key: the weight key.
        name: the model's name.
        engine: the engine and its version.
        publish: whether the engine would load and publish the model.
        timeout_s: seconds that another client may take to publish it.
        restore_from: a directory written by ``wooly save``; None: the cache's entry, if there is one.
    """

    key: str
    name: str
    engine: str
    publish: bool
    timeout_s: float
    restore_from: Path | None = None


@contextlib.contextmanager
def _no_bar(_title: str, _total: int) -> Iterator[Progress]:
    yield ignore_progress


def obtain(session: Session, need: Need, backend: Backend, progress: ProgressBar = _no_bar) -> Opened | None:
    """Attach to a model, or restore it. Returns None if this process is to load and publish it.

    Args:
        session: the connection, which becomes the model's reader or its publisher.
        need: the model.
        backend: the backend of the engine's device.
        progress: makes the progress bar of a restore.

    Raises:
        SavedModelError: the saved model is refused and this engine would not load the model. Otherwise the refusal is
            logged and counted as a fallback, and an entry of the cache that is refused is removed.
        ModelNotFoundError: the store does not have the model, it is not saved, and this engine would not load it.
        TimedOutError: another client did not finish publishing it in time.
        DigestMismatchError: the bytes in the store were wrong each time.
    """
    cache = available()
    source = need.restore_from or (cache.find(need.key) if cache else None)
    for _ in range(_ATTEMPTS):
        opened = session.open(
            need.key,
            name=need.name,
            engine=need.engine,
            device=backend.device,
            publish=need.publish or source is not None,
            timeout_s=need.timeout_s,
        )
        if opened is None:
            if source is None:
                return None
            try:
                opened = _restore(session, need, backend, source, progress)
            except WoolyError as error:
                if not need.publish or not session.alive:
                    raise
                _report_refused(session, need, source, error, cache)
                source = None
                continue
        elif envs.VERIFY.get() and not _verified(session, need, backend, opened):
            continue
        if cache:
            cache.touch(need.key)
        return opened
    raise DigestMismatchError(
        f"{need.name} in the store did not match its digests in {_ATTEMPTS} attempts; see the store's log"
    )


def _restore(session: Session, need: Need, backend: Backend, source: Path, progress: ProgressBar) -> Opened:
    """Restore a model whose publication was granted. Aborts the publication on every error."""
    try:
        with SavedModel(source) as saved:
            if saved.manifest.key != need.key:
                raise SavedModelError(
                    f"{source} is not the model that this engine needs: its key is {saved.manifest.key[:12]}, not "
                    f"{need.key[:12]}; it was saved with another checkpoint, configuration, version or device"
                )
            with progress("wooly: restoring", saved.nbytes) as done:
                return restore(session, saved, backend, done)
    except WoolyError:
        if session.alive:
            session.abandon(need.key, f"{source} could not be restored")
        raise


def _report_refused(session: Session, need: Need, source: Path, error: WoolyError, cache: Cache | None) -> None:
    """Log and count a refused saved model. Removes it if it is an entry of the cache and itself at fault."""
    log.warning("wooly: cannot restore %s; loading it instead: %s [%s]", need.name, error, error.code)
    session.report_fallback(need.name, f"{error.code}: {error}")
    if cache and isinstance(error, SavedModelError) and source == cache.path(need.key):
        cache.remove(need.key)


def _verified(session: Session, need: Need, backend: Backend, opened: Opened) -> bool:
    """Return whether a model matches its digests. If not, quarantine what differs, leave it, and close the descriptors.

    Closes the descriptors on errors, too.
    """
    attached, fds = opened
    try:
        with copier_for(backend) as copier, mapped(backend, attached, OwnedFds.duplicates(fds.filenos())) as resident:
            wrong = mismatched(resident, copier)
    except BaseException:
        fds.close()
        raise
    if not wrong:
        return True
    fds.close()
    log.error("wooly: %d blobs of %s do not match their digests; quarantining them", len(wrong), need.name)
    quarantine(session, need.key, wrong)
    session.leave(need.key)
    return False
