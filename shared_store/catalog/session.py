"""One connection to Redis, and what was written over it.

A session ends with its first error: it never reconnects, because a server that came back may have lost any part of
what this one wrote. The next session begins with :meth:`Session.resync`. Importing this module imports redis-py; only
the catalog's thread does so.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared_store.catalog import scripts
from shared_store.catalog.schema import (
    BLOB_PREFIX,
    EVENTS,
    NODES,
    LeaseDoc,
    ModelDoc,
    NodeDoc,
    NodeKeys,
    Snapshot,
    blob_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from shared_store.catalog.events import Event

T = TypeVar("T")

SOCKET_TIMEOUT_S: Final = 2.0
# Bounds of one round trip and of one script: other clients of the server wait no longer than a few milliseconds.
_PIPELINE_CALLS: Final = 100
_PIPELINE_BYTES: Final = 1 << 20
_BLOBS_PER_SCRIPT: Final = 500
# A sweep of many dead nodes must not keep this node's own writes waiting; the rest is swept next time.
_SCRIPTS_PER_SWEEP: Final = 50


class LostError(Exception):
    """The server does not have what this session wrote: it was emptied, or the node's entry ran out."""


class FencedError(Exception):
    """Another run of this node's store, started later, owns the node's keys."""


class Session:
    """Writes one node's snapshot, whole at first and then by differences.

    Every method raises :class:`redis.RedisError` or :class:`LostError` when the session is over, and
    :class:`FencedError` when it must not begin.
    """

    def __init__(self, url: str, node: NodeDoc, *, ttl_s: float, events_maxlen: int) -> None:
        self._keys = NodeKeys(node.node)
        self._epoch = node.epoch
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._events_maxlen = events_maxlen
        self._connections = 0
        # None stands for "there, but what it says is not known": it equals no document, so it is written or dropped.
        self._node: NodeDoc | None = None
        self._models: dict[str, ModelDoc | None] = {}
        self._leases: dict[int, LeaseDoc | None] = {}
        self._blobs: dict[bytes, int | None] = {}
        self._redis: Any = redis.Redis.from_url(
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
        """Close the connection. What was written stays."""
        self._redis.close()

    def resync(self, snapshot: Snapshot) -> None:
        """Claim the node's keys, write all of the snapshot, and delete what else is under the keys."""
        self._load_scripts()
        self._claim(snapshot.node)
        # After the claim nobody else writes these, so what is read here stays true until the next line changes it.
        self._models = dict.fromkeys(key.decode() for key in self._redis.smembers(self._keys.models))
        self._leases = dict.fromkeys(int(client) for client in self._redis.hkeys(self._keys.leases))
        found = self._redis.sscan_iter(self._keys.blobs, count=_BLOBS_PER_SCRIPT)
        self._blobs = dict.fromkeys(bytes.fromhex(digest.decode()) for digest in found)
        self.write(snapshot)
        self.renew()

    def write(self, snapshot: Snapshot) -> None:
        """Write the difference between the snapshot and what this session wrote last."""
        if snapshot.node != self._node:
            self._claim(snapshot.node)
        self._write_models(snapshot)
        self._write_leases(snapshot)
        self._send()

    def renew(self) -> None:
        """The heartbeat: renew the node's and its leases' time to live, and check that the server still has all."""
        keys = self._keys
        model_hashes = [keys.model(key) for key in self._models]
        counts = (len(self._models), len(self._blobs), len(self._leases))
        self._call(
            scripts.RENEW,
            [keys.info, NODES, keys.models, keys.blobs, keys.leases, *model_hashes],
            [keys.node, *counts],
        )
        self._send()

    def add_events(self, events: Iterable[Event]) -> None:
        """Append to the stream. An event that was appended before (by its sequence number) is not appended again."""
        for event in events:
            fields = {
                **event.fields,
                "kind": event.kind,
                "node": self._keys.node,
                "epoch": self._epoch,
                "seq": event.seq,
                "time": f"{event.time:.3f}",
            }
            self._call(
                scripts.ADD_EVENT, [self._keys.info, EVENTS], [event.seq, self._events_maxlen, *_flat(fields.items())]
            )
        self._send()

    def sweep(self) -> None:
        """Remove what nodes left whose time to live ran out. Any number of nodes may do so at once."""
        seconds, _ = self._redis.time()
        gone = [NodeKeys(node.decode()) for node in self._redis.zrangebyscore(NODES, "-inf", seconds)]
        budget = _SCRIPTS_PER_SWEEP
        for keys in gone:
            budget -= self._sweep_node(keys, budget)
            if budget <= 0:
                return

    def release(self) -> None:
        """Take the node out of the catalog. If it is cut short, what is left is swept by another node."""
        self._call(scripts.RELEASE, [self._keys.info, NODES, self._keys.leases], [self._keys.node])
        self._send()
        self._sweep_node(self._keys, _SCRIPTS_PER_SWEEP)

    def _connect_once(self, connection: Any) -> None:
        if self._connections:
            # redis-py would go on over a new connection, with a server that may have been restarted in between.
            raise redis.ConnectionError("the connection was lost")
        connection.on_connect()
        self._connections = 1

    def _load_scripts(self) -> None:
        sources = [value for name, value in vars(scripts).items() if name.isupper() and not name.startswith("_")]
        pipeline = self._redis.pipeline(transaction=False)
        for source in sources:
            pipeline.script_load(source)
        self._shas = dict(zip(sources, pipeline.execute(), strict=True))
        self._pipeline = self._redis.pipeline(transaction=False)

    def _claim(self, node: NodeDoc) -> None:
        fields = msgspec.structs.asdict(node) | {
            "devices": msgspec.json.encode(node.devices),
            "started_at": repr(node.started_at),
        }
        self._call(
            scripts.CLAIM, [self._keys.info, NODES], [self._keys.node, fields["started_at"], *_flat(fields.items())]
        )
        self._send()
        self._node = node

    def _write_models(self, snapshot: Snapshot) -> None:
        keys = self._keys
        models = {model.key: model for model in snapshot.models}
        changed = [model for key, model in models.items() if self._models.get(key) != model]
        gone = [key for key in self._models if key not in models]
        if not changed and not gone:
            return
        held = snapshot.held_blobs()
        new = [digest for digest, nbytes in held.items() if self._blobs.get(digest) != nbytes]
        dropped = [digest for digest in self._blobs if digest not in held]
        # In this order a digest is registered only while a model of the node has it, and a full server that is told of
        # a smaller snapshot has the room for it.
        for batch in _batches(dropped, _BLOBS_PER_SCRIPT):
            self._call(
                scripts.DROP_BLOBS,
                [keys.info, keys.blobs, *map(blob_key, batch)],
                [keys.node, *(digest.hex() for digest in batch)],
            )
        for key in gone:
            self._call(scripts.DROP_MODEL, [keys.info, keys.models, keys.model(key)], [key])
        for model in changed:
            fields = msgspec.structs.asdict(model) | {"blobs": len(model.blobs)}
            self._call(
                scripts.PUT_MODEL, [keys.info, keys.models, keys.model(model.key)], [model.key, *_flat(fields.items())]
            )
        for batch in _batches(new, _BLOBS_PER_SCRIPT):
            self._call(
                scripts.ADD_BLOBS,
                [keys.info, keys.blobs, *map(blob_key, batch)],
                [keys.node, *_flat((digest.hex(), held[digest]) for digest in batch)],
            )
        self._models = dict(models)
        self._blobs = dict(held)

    def _write_leases(self, snapshot: Snapshot) -> None:
        leases = {lease.client: lease for lease in snapshot.leases}
        gone = [client for client in self._leases if client not in leases]
        changed = [lease for client, lease in leases.items() if self._leases.get(client) != lease]
        if not changed and not gone:
            return
        puts = _flat((lease.client, msgspec.json.encode(lease)) for lease in changed)
        self._call(scripts.PUT_LEASES, [self._keys.info, self._keys.leases], [len(gone), *gone, *puts])
        self._leases = dict(leases)

    def _sweep_node(self, keys: NodeKeys, most: int) -> int:
        """How many scripts it took."""
        for used in range(1, most + 1):
            more = self._redis.evalsha(
                self._shas[scripts.SWEEP],
                5,
                *(keys.info, NODES, keys.models, keys.blobs, keys.leases),
                *(keys.node, keys.model_prefix, BLOB_PREFIX, _BLOBS_PER_SCRIPT),
            )
            if not more:
                return used
        return most

    def _call(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> None:
        """Queue one fenced script; a full queue is sent."""
        self._pipeline.evalsha(self._shas[script], len(keys), *keys, self._epoch, self._ttl_ms, *args)
        self._pipeline_bytes += sum(len(arg) for arg in args if isinstance(arg, (bytes, str)))
        if len(self._pipeline) >= _PIPELINE_CALLS or self._pipeline_bytes >= _PIPELINE_BYTES:
            self._send()

    def _send(self) -> None:
        """Send what is queued in one round trip."""
        self._pipeline_bytes = 0
        for answer in self._pipeline.execute():
            if answer == b"fenced":
                raise FencedError
            if answer == b"lost":
                raise LostError


def _flat(pairs: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
    for name, value in pairs:
        yield name
        yield value


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
