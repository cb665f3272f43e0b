"""How an engine gets a model without loading it: from the store, or from what was saved; checked, where that is wanted.

The order: what the store has is attached to. Who is granted publication looks for a saved model, first where the engine
was told to, else in the cache directory, and restores it. Where there is none, or it is refused, the engine loads.
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
from shared_store.base.errors import ConfigError, DigestMismatchError, SavedModelError, WoolyError
from shared_store.client.session import Session
from shared_store.disk.cache import Cache, configured
from shared_store.disk.restore import restore
from shared_store.disk.saved import SavedModel
from shared_store.disk.saver import save_later
from shared_store.disk.verify import mismatched, quarantine
from shared_store.memory import Backend
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.transfer.copier import Progress, copier_for, unheard
from shared_store.transfer.reading import duplicated, mapped

log = logging.getLogger(__name__)

_TRIES: Final = 4
"""Answers of the store that are looked at. What is wrong is quarantined or refused each time: more are not needed."""

Opened: TypeAlias = tuple[messages.Attached, OwnedFds]
"""The store's description of a model, and descriptors of its segments."""


@dataclass(frozen=True)
class Need:
    """The model that an engine needs. ``restore_from``: a directory that ``wooly save`` wrote; None: the cache's entry.

    ``publish``: whether the engine would load it.
    """

    key: str
    name: str
    engine: str
    publish: bool
    timeout_s: float
    restore_from: Path | None = None


@contextlib.contextmanager
def _silent(_title: str, _total: int) -> Iterator[Progress]:
    yield unheard


def obtain(
    session: Session,
    need: Need,
    backend: Backend,
    progress: Callable[[str, int], AbstractContextManager[Progress]] = _silent,
) -> Opened | None:
    """Attach to a model, restoring it if need be; None: this process is to load and publish it.

    Args:
        session: the connection, which becomes the model's reader or its publisher.
        need: which model.
        backend: of the engine's device.
        progress: makes a progress bar of a title and a number of bytes.

    Raises:
        SavedModelError: what was saved is refused, and this engine would not load the model itself. Otherwise that is
            logged and counted; an entry of the cache that is refused is removed.
        ModelNotFoundError: the store does not have it, nothing is saved, and this engine would not load it.
        TimedOutError: another client publishes it, and is not done in time.
        DigestMismatchError: the store goes on offering bytes that this process finds wrong.
    """
    cache = _cache()
    source = need.restore_from or (cache.find(need.key) if cache else None)
    for _ in range(_TRIES):
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
                _refused(session, need, source, error, cache)
                source = None
                continue
        elif envs.VERIFY.get() and not _sound(session, need, backend, opened):
            continue
        if cache:
            cache.used(need.key)
        return opened
    raise DigestMismatchError(f"{need.name} in the store is not what its digests say, again and again; see its log")


def published(key: str, runtime_dir: Path | None = None) -> None:
    """An engine published a model: have it saved in the cache, if there is one, in the background."""
    cache = _cache()
    if cache is not None:
        save_later(cache, key, runtime_dir)


def _cache() -> Cache | None:
    try:
        return configured()
    except ConfigError as error:
        log.warning("wooly: no cache is used: %s", error)
        return None


def _restore(
    session: Session,
    need: Need,
    backend: Backend,
    source: Path,
    progress: Callable[[str, int], AbstractContextManager[Progress]],
) -> Opened:
    """Restore what was granted. Whatever is wrong, the publication is given up then."""
    try:
        with SavedModel(source) as saved:
            if saved.manifest.key != need.key:
                raise SavedModelError(
                    f"{source} has another model than this engine needs: its key is {saved.manifest.key[:12]}, not "
                    f"{need.key[:12]}; checkpoint, configuration, versions and device must be as when it was saved"
                )
            with progress("wooly: restoring", saved.nbytes) as done:
                return restore(session, saved, backend, done)
    except WoolyError:
        if session.alive:
            session.abandon(need.key, f"{source} could not be restored")
        raise


def _refused(session: Session, need: Need, source: Path, error: WoolyError, cache: Cache | None) -> None:
    """Say and count that a saved model is of no use; an entry of the cache goes when the fault is its own."""
    log.warning("wooly: %s is not restored but loaded: %s [%s]", need.name, error, error.code)
    session.report_fallback(need.name, f"{error.code}: {error}")
    if cache and isinstance(error, SavedModelError) and source == cache.entry(need.key):
        cache.discard(need.key)


def _sound(session: Session, need: Need, backend: Backend, opened: Opened) -> bool:
    """Whether the bytes are what their digests say. If not, they are out of service, and nothing of them is kept."""
    attached, fds = opened
    try:
        with copier_for(backend) as copier, mapped(backend, attached, duplicated(fds.filenos())) as holding:
            wrong = mismatched(holding, copier)
    except BaseException:
        fds.close()
        raise
    if not wrong:
        return True
    fds.close()
    log.error(
        "wooly: %d blobs of %s are not what their digests say: they are quarantined, and not used",
        len(wrong),
        need.name,
    )
    quarantine(session, need.key, wrong)
    session.leave(need.key)
    return False
