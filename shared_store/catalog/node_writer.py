"""Write the entries of one node, over one connection: everything at first, then differences.

Importing this module imports redis-py; only the catalog's thread does so.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from shared_store.catalog import scripts
from shared_store.catalog.fenced_pipeline import FencedError, FencedPipeline, LostError
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
    committed_blobs,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shared_store.catalog.event_buffer import Event

__all__ = ["FencedError", "LostError", "NodeWriter"]

T = TypeVar("T")

# Bound of one script: other clients of the server wait for it at most a few milliseconds.
_BLOBS_PER_SCRIPT: Final = 500
# A sweep of many dead nodes must not delay this node's own writes; the next sweep continues.
_SCRIPTS_PER_SWEEP: Final = 50


class NodeWriter:
    """Writes the snapshots of a node.

    Every method raises as :class:`FencedPipeline`. The next writer begins with :meth:`resync`.
    """

    def __init__(self, url: str, node: NodeDoc, *, ttl_s: float, events_maxlen: int) -> None:
        self._keys = NodeKeys(node.node)
        self._epoch = node.epoch
        self._events_maxlen = events_maxlen
        # None: an entry exists with unknown content. It equals no document, so it is rewritten or removed.
        self._node: NodeDoc | None = None
        self._models: dict[str, ModelDoc | None] = {}
        self._leases: dict[int, LeaseDoc | None] = {}
        self._blobs: dict[bytes, int | None] = {}
        self._uses: dict[bytes, int] = {}  # by digest: committed models that have the blob
        self._pipeline = FencedPipeline(url, epoch=node.epoch, ttl_s=ttl_s)

    def close(self) -> None:
        """Close the connection. Written entries remain."""
        self._pipeline.close()

    def resync(self, snapshot: Snapshot) -> None:
        """Claim the node's keys, write the whole snapshot, and delete all other entries of the node."""
        self._pipeline.load_scripts()
        self._claim(snapshot.node)
        # After the claim no other store writes these keys, so the entries read here stay true until the next write.
        redis = self._pipeline.redis
        self._models = dict.fromkeys(key.decode() for key in redis.smembers(self._keys.models))
        self._leases = dict.fromkeys(int(client) for client in redis.hkeys(self._keys.leases))
        found = redis.sscan_iter(self._keys.blobs, count=_BLOBS_PER_SCRIPT)
        self._blobs = dict.fromkeys(bytes.fromhex(digest.decode()) for digest in found)
        self._uses = {}
        self.write(snapshot)
        self.renew()

    def write(self, snapshot: Snapshot) -> None:
        """Write the difference between this snapshot and the last one."""
        if snapshot.node != self._node:
            self._claim(snapshot.node)
        self._write_models(snapshot)
        self._write_leases(snapshot)
        self._pipeline.send()

    def renew(self) -> None:
        """Renew the time to live of the node and its leases (heartbeat), and check that the server lost no entry."""
        keys = self._keys
        model_hashes = [keys.model(key) for key in self._models]
        counts = (len(self._models), len(self._blobs), len(self._leases))
        self._pipeline.call(
            scripts.RENEW,
            [keys.info, NODES, keys.models, keys.blobs, keys.leases, *model_hashes],
            [keys.node, *counts],
        )
        self._pipeline.send()

    def add_events(self, events: Iterable[Event]) -> None:
        """Append events to the stream. The server skips an event whose sequence number it has already."""
        for event in events:
            fields = {
                **event.fields,
                "kind": event.kind,
                "node": self._keys.node,
                "epoch": self._epoch,
                "seq": event.seq,
                "time": f"{event.time:.3f}",
            }
            self._pipeline.call(
                scripts.ADD_EVENT, [self._keys.info, EVENTS], [event.seq, self._events_maxlen, *_flat(fields.items())]
            )
        self._pipeline.send()

    def sweep(self) -> None:
        """Remove the entries of nodes whose time to live expired. Several nodes may sweep at once."""
        seconds, _ = self._pipeline.redis.time()
        gone = [NodeKeys(node.decode()) for node in self._pipeline.redis.zrangebyscore(NODES, "-inf", seconds)]
        budget = _SCRIPTS_PER_SWEEP
        for keys in gone:
            budget -= self._sweep_node(keys, budget)
            if budget <= 0:
                return

    def release(self) -> None:
        """Remove the node from the catalog. If this is interrupted, another node sweeps the rest."""
        self._pipeline.call(scripts.RELEASE, [self._keys.info, NODES, self._keys.leases], [self._keys.node])
        self._pipeline.send()
        self._sweep_node(self._keys, _SCRIPTS_PER_SWEEP)

    def _claim(self, node: NodeDoc) -> None:
        fields = msgspec.structs.asdict(node) | {
            "devices": msgspec.json.encode(node.devices),
            "started_at": repr(node.started_at),
        }
        self._pipeline.call(
            scripts.CLAIM, [self._keys.info, NODES], [self._keys.node, fields["started_at"], *_flat(fields.items())]
        )
        self._pipeline.send()
        self._node = node

    def _write_models(self, snapshot: Snapshot) -> None:
        keys, call = self._keys, self._pipeline.call
        models = {model.key: model for model in snapshot.models}
        changed = [model for key, model in models.items() if _differs(self._models.get(key), model)]
        removed = [key for key in self._models if key not in models]
        if not changed and not removed:
            return
        added, dropped = self._update_uses(removed, changed)
        # In this order a digest is registered only while a model of the node has it, and a full server accepts a
        # smaller snapshot.
        for batch in _batches(dropped, _BLOBS_PER_SCRIPT):
            call(
                scripts.DROP_BLOBS,
                [keys.info, keys.blobs, *map(blob_key, batch)],
                [keys.node, *(digest.hex() for digest in batch)],
            )
        for key in removed:
            call(scripts.DROP_MODEL, [keys.info, keys.models, keys.model(key)], [key])
        for model in changed:
            fields = msgspec.structs.asdict(model) | {"blobs": len(model.blobs)}
            call(
                scripts.PUT_MODEL, [keys.info, keys.models, keys.model(model.key)], [model.key, *_flat(fields.items())]
            )
        for batch in _batches(added, _BLOBS_PER_SCRIPT):
            call(
                scripts.ADD_BLOBS,
                [keys.info, keys.blobs, *map(blob_key, batch)],
                [keys.node, *_flat((digest.hex(), added[digest]) for digest in batch)],
            )
        self._models = dict(models)
        self._blobs |= added
        for digest in dropped:
            del self._blobs[digest]

    def _update_uses(self, removed: Iterable[str], changed: Iterable[ModelDoc]) -> tuple[dict[bytes, int], list[bytes]]:
        """Count the blobs of models that came, changed or went; visit no others.

        Returns:
            The sizes of blobs to register, by digest, and the digests to remove.
        """
        uses, sizes = self._uses, dict[bytes, int]()
        # Entries that were found on the server belong to no model that is known here.
        touched = {digest for digest, nbytes in self._blobs.items() if nbytes is None} if not uses else set[bytes]()
        before = [self._models.get(key) for key in (*removed, *(model.key for model in changed))]
        for model, step in (*((one, -1) for one in before), *((one, 1) for one in changed)):
            for blob in committed_blobs(model):
                uses[blob.digest] = uses.get(blob.digest, 0) + step
                sizes[blob.digest] = blob.nbytes
                touched.add(blob.digest)
        unused = [digest for digest in touched if not uses.get(digest)]
        for digest in unused:
            uses.pop(digest, None)
        added = {
            digest: nbytes for digest, nbytes in sizes.items() if digest in uses and self._blobs.get(digest) != nbytes
        }
        return added, [digest for digest in unused if digest in self._blobs]

    def _write_leases(self, snapshot: Snapshot) -> None:
        leases = {lease.client: lease for lease in snapshot.leases}
        removed = [client for client in self._leases if client not in leases]
        changed = [lease for client, lease in leases.items() if _differs(self._leases.get(client), lease)]
        if not changed and not removed:
            return
        puts = _flat((lease.client, msgspec.json.encode(lease)) for lease in changed)
        self._pipeline.call(scripts.PUT_LEASES, [self._keys.info, self._keys.leases], [len(removed), *removed, *puts])
        self._leases = dict(leases)

    def _sweep_node(self, keys: NodeKeys, most: int) -> int:
        """Sweep a node with at most this number of scripts. Return the number used."""
        for used in range(1, most + 1):
            more = self._pipeline.call_now(
                scripts.SWEEP,
                (keys.info, NODES, keys.models, keys.blobs, keys.leases),
                (keys.node, keys.model_prefix, BLOB_PREFIX, _BLOBS_PER_SCRIPT),
            )
            if not more:
                return used
        return most


def _differs(written: object, now: object) -> bool:
    """Return whether a document must be written. One that did not change is mostly the same object."""
    return written is not now and written != now


def _flat(pairs: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
    for name, value in pairs:
        yield name
        yield value


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
