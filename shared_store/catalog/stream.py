"""Reading the catalog's stream of events, for the command line.

It needs the server and no store, and writes nothing. It relies on ids of a stream growing with time, as the server
makes them. Not promised: events that were trimmed (the stream keeps about the last 10,000), or that a store has not
written yet. Importing this module imports redis-py.
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
_BLOCK_MS: Final = 2000  # less than the above: a server that is there answers in time, with nothing if there is nothing
_AT_ONCE: Final = 500
_ABOUT: Final = ("kind", "node", "epoch", "seq", "time")
_NUMBERS: Final = frozenset({"bytes", "count", "down_ms", "freed_bytes", "moved_bytes", "pid", "segment"})


class EventEntry(msgspec.Struct, frozen=True):
    """One event of the stream.

    ``id`` is the stream's; ``time`` is Unix seconds of the node's clock; ``seq`` counts from 1 in each ``epoch``,
    which is one run of a store. ``fields`` are what its kind has.
    """

    id: str
    time: float
    kind: str
    node: str
    epoch: str
    seq: int
    fields: dict[str, str | int]


class EventStream:
    """The stream of one server. Every method raises :class:`CatalogUnavailableError` when the server is away.

    ``node``: of this node alone; ``kinds``: of these kinds alone; both leave out nothing by default.
    Raises :class:`ConfigError` for a URL that cannot be one of Redis.
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
        """The newest events, ``most`` of them, oldest first. What :meth:`follow` gives begins after them."""
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
        """Events as they come, without end. A server that goes away ends it with the error."""
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
    """What a store wrote, or anybody else who may write to the server: so nothing is taken for granted."""
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
            f"the catalog does not answer: {error}; see that its server runs, and give its URL with --redis-url or "
            "WOOLY_REDIS_URL (a store without one runs its own, which ends with it)"
        ) from error
