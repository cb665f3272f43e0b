"""Mapping phases of this process's workers, over the session of a model that it shares."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

from shared_store.client.mapping_phase import mapping_phase
from shared_store.client.session import Session
from shared_store.memory import Backend
from shared_store.private.ranges import Phase

_sessions: list[weakref.ref[Session]] = []
"""Sessions of models of this process, oldest first."""


def use(session: Session) -> None:
    """Take turns over this session from now on, if those before it have ended."""
    _sessions.append(weakref.ref(session))


def phase_of(backend: Backend) -> Phase:
    """Return the phases of a device."""

    @contextlib.contextmanager
    def phase() -> Iterator[None]:
        session = _session() if backend.asynchronous else None
        with contextlib.nullcontext() if session is None else mapping_phase(session, backend):
            yield

    return phase


def _session() -> Session | None:
    alive = [session for it in _sessions if (session := it()) is not None and session.alive]
    return alive[0] if alive else None
