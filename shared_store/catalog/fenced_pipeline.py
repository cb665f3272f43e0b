"""One connection to Redis, over which fenced scripts are sent in pipelines.

A connection ends with its first error and never reconnects: a restarted server may have lost any part of the data.
Importing this module imports redis-py; only the catalog's thread does so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared_store.catalog import scripts

if TYPE_CHECKING:
    from collections.abc import Sequence

SOCKET_TIMEOUT_S: Final = 2.0
# Bounds of one round trip: other clients of the server wait for it at most a few milliseconds.
_PIPELINE_CALLS: Final = 100
_PIPELINE_BYTES: Final = 1 << 20


class LostError(Exception):
    """The server lost the data of this connection: it was emptied, or the node's entry expired."""


class FencedError(Exception):
    """Another run of this node's store, started later, owns the node's keys."""


class FencedPipeline:
    """Sends scripts that check the epoch before they write.

    Every method raises :class:`redis.RedisError`, :class:`LostError` or :class:`FencedError`. The connection must not
    be used afterwards.
    """

    def __init__(self, url: str, *, epoch: str, ttl_s: float) -> None:
        self._epoch = epoch
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._connected = False
        self.redis: Any = redis.Redis.from_url(
            url,
            protocol=2,
            max_connections=1,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=self._connect_once,
        )
        self._shas: dict[str, str] = {}
        self._pipeline: Any = None
        self._pipeline_bytes = 0

    def close(self) -> None:
        """Close the connection. Written data remains."""
        self.redis.close()

    def load_scripts(self) -> None:
        """Load all scripts into the server. Required before any call."""
        sources = [value for name, value in vars(scripts).items() if name.isupper() and not name.startswith("_")]
        pipeline = self.redis.pipeline(transaction=False)
        for source in sources:
            pipeline.script_load(source)
        self._shas = dict(zip(sources, pipeline.execute(), strict=True))
        self._pipeline = self.redis.pipeline(transaction=False)

    def call(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> None:
        """Queue a script, with the epoch and the time to live as its first arguments. A full pipeline is sent."""
        self._pipeline.evalsha(self._shas[script], len(keys), *keys, self._epoch, self._ttl_ms, *args)
        self._pipeline_bytes += sum(len(arg) for arg in args if isinstance(arg, (bytes, str)))
        if len(self._pipeline) >= _PIPELINE_CALLS or self._pipeline_bytes >= _PIPELINE_BYTES:
            self.send()

    def send(self) -> None:
        """Send the queued scripts in one round trip."""
        self._pipeline_bytes = 0
        for answer in self._pipeline.execute():
            if answer == b"fenced":
                raise FencedError
            if answer == b"lost":
                raise LostError

    def call_now(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script that is not fenced, and return its answer."""
        return self.redis.evalsha(self._shas[script], len(keys), *keys, *args)

    def _connect_once(self, connection: Any) -> None:
        if self._connected:
            # redis-py would continue over a new connection, with a server that may have been restarted.
            raise redis.ConnectionError("the connection was lost")
        connection.on_connect()
        self._connected = True
