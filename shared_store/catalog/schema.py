"""The documents that the catalog mirrors, and the names of the keys that they are written under.

Pure: no connection, no clock. All sizes are bytes. ``docs/catalog.md`` has the table of keys for other programs; a key
is only ever added or given a new name, never another meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

PREFIX = "wooly:"
NODES = f"{PREFIX}nodes"
EVENTS = f"{PREFIX}events"
# Reserved for what a cluster's administrator sets for all stores. Nothing here writes it.
SETTINGS = f"{PREFIX}settings"
BLOB_PREFIX = f"{PREFIX}blob:"


class BlobDoc(msgspec.Struct, frozen=True, gc=False):
    """One blob: ``digest`` is the 32 bytes of its BLAKE3-256."""

    digest: bytes
    nbytes: int


class ModelDoc(msgspec.Struct, frozen=True):
    """One model of the node. ``manifest`` is msgpack, opaque here and empty while the model is being published."""

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
    """One client's live connection to the store. ``client`` is unique within the store's epoch."""

    client: int
    pid: int
    uid: int
    name: str
    key: str
    role: str


class NodeDoc(msgspec.Struct, frozen=True):
    """One run of a node's store.

    ``node`` is stable over restarts and names the keys; ``epoch`` is random for each run; of two runs with one
    ``node``, the one with the later ``started_at`` (Unix seconds) owns the keys. ``devices`` is the capacity: device id
    to ``{"resident_bytes": ..., "limit_bytes": ...}`` or whatever else the store counts.
    """

    node: str
    epoch: str
    pid: int
    hostname: str
    version: str
    started_at: float
    devices: dict[str, dict[str, int | None]]


class Snapshot(msgspec.Struct, frozen=True):
    """Everything that the catalog should say of a node at one moment."""

    node: NodeDoc
    models: tuple[ModelDoc, ...]
    leases: tuple[LeaseDoc, ...]

    def held_blobs(self) -> dict[bytes, int]:
        """Digest to size of what the node can serve: the blobs of its committed models.

        A model that is being published names blobs whose bytes may not be there yet, so those do not count.
        """
        return {blob.digest: blob.nbytes for model in self.models if model.state == "committed" for blob in model.blobs}


@dataclass(frozen=True)
class NodeKeys:
    """The keys of one node."""

    node: str

    @property
    def info(self) -> str:
        """Hash of the :class:`NodeDoc`; its time to live is the node's, and its epoch fences every write."""
        return f"{PREFIX}node:{self.node}"

    @property
    def models(self) -> str:
        """Set of the node's model keys."""
        return f"{self.info}:models"

    @property
    def model_prefix(self) -> str:
        """What the keys of the node's model hashes start with."""
        return f"{self.info}:model:"

    @property
    def leases(self) -> str:
        """Hash of the node's leases: client to JSON."""
        return f"{self.info}:leases"

    @property
    def blobs(self) -> str:
        """Set of the digests (hex) under which the node is registered, so that they can be found when it is gone."""
        return f"{self.info}:blobs"

    def model(self, key: str) -> str:
        """Hash of one :class:`ModelDoc`."""
        return f"{self.model_prefix}{key}"


def blob_key(digest: bytes) -> str:
    """Hash of the nodes that hold a blob: node to size in bytes."""
    return f"{BLOB_PREFIX}{digest.hex()}"
