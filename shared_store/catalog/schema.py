"""Documents of the catalog, and the names of their keys.

Pure: no connection, no clock. All sizes are in bytes. ``docs/catalog.md`` has the table of keys for other programs. A
key never changes its meaning; a new meaning gets a new name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

PREFIX = "wooly:"
NODES = f"{PREFIX}nodes"
EVENTS = f"{PREFIX}events"
# Reserved for settings of a whole cluster, written by its administrator. No store writes it.
SETTINGS = f"{PREFIX}settings"
BLOB_PREFIX = f"{PREFIX}blob:"


class BlobDoc(msgspec.Struct, frozen=True, gc=False):
    """A blob. ``digest`` is its BLAKE3-256 (32 bytes)."""

    digest: bytes
    nbytes: int


class ModelDoc(msgspec.Struct, frozen=True):
    """A model of the node. ``manifest`` is msgpack; it is empty while the model is being published."""

    key: str
    name: str
    engine: str
    device: str
    state: Literal["publishing", "committed"]
    tensors: int
    nbytes: int
    manifest: bytes
    blobs: tuple[BlobDoc, ...]


class LeaseDoc(msgspec.Struct, frozen=True):
    """A client's connection to the store. ``client`` is unique within the store's epoch."""

    client: int
    pid: int
    uid: int
    name: str
    key: str
    role: str


class NodeDoc(msgspec.Struct, frozen=True):
    """One run of a node's store.

    ``node`` is stable over restarts and is part of the keys. ``epoch`` is random for each run. Of two runs with the
    same ``node``, the one with the later ``started_at`` (Unix seconds) owns the keys. ``devices`` maps a device to its
    capacity, ``{"resident_bytes": ..., "limit_bytes": ...}``.
    """

    node: str
    epoch: str
    pid: int
    hostname: str
    version: str
    started_at: float
    devices: dict[str, dict[str, int | None]]


class Snapshot(msgspec.Struct, frozen=True):
    """The state of a node at one moment."""

    node: NodeDoc
    models: tuple[ModelDoc, ...]
    leases: tuple[LeaseDoc, ...]


@dataclass(frozen=True)
class NodeKeys:
    """The keys of one node."""

    node: str

    @property
    def info(self) -> str:
        """Hash of the :class:`NodeDoc`. The node lives as long as this key. Every write compares its epoch."""
        return f"{PREFIX}node:{self.node}"

    @property
    def models(self) -> str:
        """Set of the node's model keys."""
        return f"{self.info}:models"

    @property
    def model_prefix(self) -> str:
        """Prefix of the keys of the node's model hashes."""
        return f"{self.info}:model:"

    @property
    def leases(self) -> str:
        """Hash of the node's leases, from client to JSON."""
        return f"{self.info}:leases"

    @property
    def blobs(self) -> str:
        """Set of the digests (hex) that the node is registered for. A sweep uses it when the node is gone."""
        return f"{self.info}:blobs"

    def model(self, key: str) -> str:
        """Hash of one :class:`ModelDoc`."""
        return f"{self.model_prefix}{key}"


def blob_key(digest: bytes) -> str:
    """Return the key of the hash of nodes that can serve a blob, from node to size in bytes."""
    return f"{BLOB_PREFIX}{digest.hex()}"


def committed_blobs(model: ModelDoc | None) -> tuple[BlobDoc, ...]:
    """Return the blobs of a model that the node can serve.

    Blobs of a model that is being published are left out: their bytes may not be written yet.
    """
    return model.blobs if model is not None and model.state == "committed" else ()
