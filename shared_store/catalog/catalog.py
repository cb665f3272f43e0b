"""The catalog: a thread that keeps Redis or Valkey saying what the store last handed in.

The store calls :meth:`Catalog.update` and :meth:`Catalog.event` from its event loop; both only leave something for the
thread. The thread writes differences, renews the node's time to live, and after any trouble writes everything again.
It relies on one server (not Redis Cluster) of version 6.2 or later.

Not promised: that the catalog is current at any one moment (:meth:`Catalog.flush` waits for that), that an event is in
the stream exactly once (its ``seq`` tells), or anything at all while :attr:`Catalog.state` is ``down``.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

from shared_store.base.errors import ConfigError
from shared_store.catalog.events import Event, EventBuffer
from shared_store.runtime.backoff import delays

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared_store.catalog.schema import Snapshot
    from shared_store.catalog.session import Session

CatalogState = Literal["ok", "down"]

_SCHEMES: Final = ("redis", "rediss", "unix")
_EVENTS_BUFFERED: Final = 1000
_EVENTS_AT_ONCE: Final = 200
# A server that takes everything and fails soon after, again and again, is not written to ten times a second.
_STEADY_S: Final = 5.0
_log = logging.getLogger(__name__)


class Catalog:
    """Mirrors a node's snapshots into the server at ``url``.

    ``lease_ttl_s``: seconds after which a store that fell silent counts as gone. ``events_maxlen``: about how many
    events the cluster's stream keeps. ``on_change`` is called with the new state, in the catalog's thread.
    Raises :class:`ConfigError` for a URL that cannot be one of Redis.
    """

    def __init__(
        self,
        url: str,
        *,
        lease_ttl_s: float = 15.0,
        events_maxlen: int = 10_000,
        on_change: Callable[[CatalogState], None] | None = None,
    ) -> None:
        self._display_url = _without_credentials(url)
        self._url = url
        self._ttl_s = lease_ttl_s
        self._events_maxlen = events_maxlen
        self._on_change = on_change
        self._thread: threading.Thread | None = None
        self._state: CatalogState = "down"
        # The condition guards what the store and the thread share, which is all of the following.
        self._condition = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._changed = False
        self._events = EventBuffer(_EVENTS_BUFFERED)
        self._flushes_asked = 0
        self._flushes_done = 0
        self._stopping = False
        self._stop_before = 0.0
        # The rest is the thread's own.
        self._unsent: list[Event] = []
        self._down_since: float | None = None
        self._trouble: str | None = None

    @property
    def url(self) -> str:
        """The server's URL without user name and password, for people to read."""
        return self._display_url

    @property
    def state(self) -> CatalogState:
        """``ok`` once everything was written, ``down`` before that and from the first failure on."""
        return self._state

    def start(self, snapshot: Snapshot) -> None:
        """Begin to mirror. Returns at once, whether the server answers or not."""
        self.update(snapshot)
        self._thread = threading.Thread(target=self._run, name="wooly-catalog", daemon=True)
        self._thread.start()

    def update(self, snapshot: Snapshot) -> None:
        """Hand in what the store holds now; the latest snapshot wins. Any thread may call it. Never blocks."""
        with self._condition:
            self._snapshot = snapshot
            self._changed = True
            self._condition.notify_all()

    def event(self, kind: str, **fields: str | int) -> None:
        """Hand in an event for the stream. Any thread may call it. Never blocks.

        A bounded number waits while the server is away; when the oldest are dropped, an event ``events_dropped`` with
        their ``count`` takes their place.
        """
        with self._condition:
            self._events.add(kind, fields)
            self._condition.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the server confirmed that it has everything handed in so far; false if it has not in time."""
        with self._condition:
            self._flushes_asked += 1
            mine = self._flushes_asked
            self._condition.notify_all()
            return self._condition.wait_for(lambda: self._flushes_done >= mine, timeout_s)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Take the node out of the catalog if the server answers within ``timeout_s``, and end the thread.

        When it does not answer, the node's time to live runs out and other nodes remove what it left.
        """
        with self._condition:
            self._stopping = True
            self._stop_before = time.monotonic() + timeout_s
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        # Here and not above, because redis-py takes longer to import than the store takes to be ready.
        from redis.exceptions import RedisError

        from shared_store.catalog.session import FencedError, LostError

        waits = delays()
        while not self._stopping:
            session = None
            began = time.monotonic()
            try:
                session = self._open()
                self._serve(session)
            except FencedError:
                self._down(
                    "another store of this node, started later, owns the node's entries, so this store's writes are "
                    "refused; stop one of the two (`wooly status` shows this one's process)"
                )
            except LostError:
                self._down("the server lost what was written, or counted this node as gone; writing it again")
            except (RedisError, OSError) as error:
                self._down(f"{error}; the store serves without it and keeps trying")
            except Exception:  # noqa: BLE001 - logged with its stack, and retried
                # A defect must not end the thread while the state says that all is well.
                _log.exception("catalog %s: unexpected failure", self.url)
                self._down("unexpected failure, see the log above")
            finally:
                if session is not None:
                    session.close()
            if session is not None and time.monotonic() - began > _STEADY_S:
                waits = delays()
            with self._condition:
                self._condition.wait_for(lambda: self._stopping, next(waits))

    def _open(self) -> Session:
        """A session over which everything was written."""
        from shared_store.catalog.session import Session

        with self._condition:
            snapshot = self._snapshot
            self._changed = False
        assert snapshot is not None  # noqa: S101 - start() hands one in
        session = Session(self._url, snapshot.node, ttl_s=self._ttl_s, events_maxlen=self._events_maxlen)
        try:
            session.resync(snapshot)
        except BaseException:
            session.close()
            raise
        self._up()
        return session

    def _serve(self, session: Session) -> None:
        """Write what is handed in, until told to stop."""
        renew_at = time.monotonic() + self._ttl_s / 3
        sweep_at = time.monotonic() + self._sweep_pause()
        while True:
            with self._condition:
                self._condition.wait_for(self._has_work, max(0.0, min(renew_at, sweep_at) - time.monotonic()))
                stopping = self._stopping
                snapshot = self._snapshot if self._changed else None
                self._changed = False
                asked = self._flushes_asked
                flushing = asked > self._flushes_done
            if stopping:
                self._leave(session)
                return
            if snapshot is not None:
                session.write(snapshot)
            self._send_events(session)
            if flushing or time.monotonic() >= renew_at:
                session.renew()
                renew_at = time.monotonic() + self._ttl_s / 3
            if time.monotonic() >= sweep_at:
                session.sweep()
                sweep_at = time.monotonic() + self._sweep_pause()
            with self._condition:
                self._flushes_done = asked
                self._condition.notify_all()

    def _has_work(self) -> bool:
        return bool(
            self._stopping
            or self._changed
            or self._unsent
            or len(self._events)
            or self._flushes_asked > self._flushes_done
        )

    def _send_events(self, session: Session) -> None:
        """Send the events of the time of the call. A batch stays ``_unsent`` until the server has it."""
        with self._condition:
            due = len(self._events)
        while True:
            session.add_events(self._unsent)
            self._unsent = []
            if due <= 0:
                return
            due -= _EVENTS_AT_ONCE
            with self._condition:
                self._unsent = self._events.take(_EVENTS_AT_ONCE)

    def _leave(self, session: Session) -> None:
        self._send_events(session)
        if time.monotonic() < self._stop_before:
            session.release()

    def _sweep_pause(self) -> float:
        # By chance, so that the nodes of a cluster seldom sweep the same dead node at the same moment.
        return self._ttl_s * random.uniform(0.5, 1.5)  # noqa: S311 - nothing secret

    def _up(self) -> None:
        self._trouble = None
        if self._down_since is not None:
            down_ms = round((time.monotonic() - self._down_since) * 1000)
            self._down_since = None
            self.event("catalog_restored", down_ms=down_ms)
            _log.warning("catalog %s is whole again after %.1f s", self.url, down_ms / 1000)
        self._set_state("ok")

    def _down(self, trouble: str) -> None:
        if self._down_since is None:
            self._down_since = time.monotonic()
        if trouble != self._trouble:
            self._trouble = trouble
            _log.warning("catalog %s is down: %s", self.url, trouble)
        self._set_state("down")

    def _set_state(self, state: CatalogState) -> None:
        if state == self._state:
            return
        self._state = state
        if self._on_change is not None:
            try:
                self._on_change(state)
            except Exception:  # noqa: BLE001 - whatever it raises
                # The store's callback may fail while the store shuts down; the mirror goes on.
                _log.exception("catalog %s: on_change(%r) failed", self.url, state)


def _without_credentials(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError as error:
        raise ConfigError(f"the catalog's URL cannot be read: {error}; use redis://HOST:PORT/DB") from error
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"the catalog's URL begins with {parts.scheme!r}; use redis://HOST:PORT/DB, rediss://... or unix:///PATH"
        )
    query = [(name, value) for name, value in parse_qsl(parts.query) if name not in {"username", "password"}]
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)).geturl()
    # geturl() drops an empty authority's slashes for schemes that it does not know.
    return shown if shown.startswith(f"{parts.scheme}://") else shown.replace(":", "://", 1)
