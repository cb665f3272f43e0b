"""Read the catalog's stream of events, for ``wooly events``.

It needs the catalog server and no store, and writes nothing. Importing this module imports redis-py.

Relies on: stream ids that increase with time, as the server creates them.

Does not promise: events that were trimmed (the stream retains about the last 10,000) or are not written yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared_store.base.errors import CatalogUnavailableError, ConfigError
from shared_store.catalog.schema import EVENTS

_ANSWER_WITHIN_S: Final = 5.0
_BLOCK_MS: Final = (
    2000  # less than the time-out above, so that a live server answers in time, without events if there are none
)
_AT_ONCE: Final = 500
_ABOUT: Final = ("kind", "node", "epoch", "seq", "time")
_NUMBERS: Final = frozenset({"bytes", "count", "down_ms", "freed_bytes", "moved_bytes", "pid", "segment", "uid"})


class EventEntry(msgspec.Struct, frozen=True):
    """An event of the stream.

    ``id`` is the stream's id. ``time`` is in Unix seconds by the node's clock. ``seq`` counts from 1 in each ``epoch``,
    which is one run of a store. ``fields`` depend on the kind.
    """

    id: str
    time: float
    kind: str
    node: str
    epoch: str
    seq: int
    fields: dict[str, str | int]


class EventStream:
    """The stream of one server. Every method raises :class:`CatalogUnavailableError` if the server does not answer.

    Args:
        url: URL of the server.
        node: show events of this node only; None: of all nodes.
        kinds: show events of these kinds only; empty: of all kinds.

    Raises:
        ConfigError: ``url`` is not the URL of a Redis server.
    """

    def __init__(self, url: str, *, node: str | None = None, kinds: Iterable[str] = ()) -> None:
        self._node = node
        self._kinds = frozenset(kinds)
        self._last_id = "0-0"
        try:
            self._redis: Any = redis.Redis.from_url(
                url,
                protocol=2,
                decode_responses=True,
                encoding_errors="replace",
                socket_timeout=_ANSWER_WITHIN_S,
                socket_connect_timeout=_ANSWER_WITHIN_S,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigError(f"the catalog's URL cannot be used: {error}; use redis://HOST:PORT/DB") from error

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    def last(self, most: int) -> list[EventEntry]:
        """Return the newest events, at most ``most``, oldest first. :meth:`follow` continues after them."""
        found: list[EventEntry] = []
        with _typed_errors():
            newest = self._redis.xrevrange(EVENTS, count=1)
            if not newest:
                return []
            self._last_id = end = newest[0][0]
            while len(found) < most:
                batch = self._redis.xrevrange(EVENTS, max=end, count=_AT_ONCE)
                found.extend(self._wanted(batch))
                if len(batch) < _AT_ONCE:
                    break
                end = f"({batch[-1][0]}"
        return found[:most][::-1]

    def follow(self) -> Iterator[EventEntry]:
        """Yield events as they are written, without end."""
        while True:
            with _typed_errors():
                answer = self._redis.xread({EVENTS: self._last_id}, count=_AT_ONCE, block=_BLOCK_MS)
            for _, batch in answer or ():
                self._last_id = batch[-1][0]
                yield from self._wanted(batch)

    def _wanted(self, batch: Iterable[tuple[str, dict[str, str]]]) -> Iterator[EventEntry]:
        for number, fields in batch:
            event = _entry(number, fields)
            if (self._node is None or event.node == self._node) and (not self._kinds or event.kind in self._kinds):
                yield event


def _entry(number: str, fields: dict[str, str]) -> EventEntry:
    """Decode an entry. Any program may write to the server, so every field may be missing or wrong."""
    about = {name: fields.get(name, "") for name in _ABOUT}
    rest = {
        name: int(value) if name in _NUMBERS and value.isascii() and value.isdigit() else value
        for name, value in fields.items()
        if name not in _ABOUT
    }
    try:
        time, seq = float(about["time"]), int(about["seq"])
    except ValueError:
        time, seq = float(number.partition("-")[0]) / 1000, 0  # the server's time
    return EventEntry(number, time, about["kind"], about["node"], about["epoch"], seq, rest)


@contextlib.contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise CatalogUnavailableError(
            f"the catalog does not answer: {error}; check that its server runs, and pass its URL with --redis-url or "
            "WOOLY_REDIS_URL (without a URL the store runs an embedded server, which ends with the store)"
        ) from error
