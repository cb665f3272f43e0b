"""What a store keeps of its clients, its models and what it did: plain data, with nothing decided in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from shared_store.base.keys import host_key
from shared_store.base.manifest import Manifest
from shared_store.catalog import BlobDoc
from shared_store.protocol import messages
from shared_store.store.state.blob_union import distinct


@dataclass
class Client:
    """What the store knows of a connection. ``gone`` is set when it ends."""

    number: int
    pid: int
    uid: int
    name: str
    gone: asyncio.Event
    push: Callable[[str, str], None]
    private_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class Committed:
    """A committed model's manifest, as it came and as it reads."""

    data: bytes
    manifest: Manifest

    @cached_property
    def nbytes(self) -> int:
        """Bytes that a private copy of the model's tensors would take."""
        return self.manifest.nbytes

    @cached_property
    def host_key(self) -> str:
        """The key that its host copy has, if there is one."""
        return host_key(self.manifest.key, (blob.digest for blob in self.manifest.blobs))

    @cached_property
    def blobs(self) -> tuple[BlobDoc, ...]:
        """The distinct blobs, as the catalog has them."""
        return tuple(BlobDoc(digest, nbytes) for digest, nbytes in distinct(self.manifest).items())


@dataclass
class Counts:
    """Events since the store started."""

    attaches: int = 0
    publishes: int = 0
    aborted_publishes: int = 0
    fallbacks: int = 0
    protocol_errors: int = 0
    evictions: int = 0
    compactions: int = 0
    quarantines: int = 0


@dataclass(frozen=True)
class Attachment:
    """What a reader needs: the manifest, a place for each of its blobs, and the fds of the segments (the caller's)."""

    manifest: bytes
    places: tuple[messages.BlobPlace, ...]
    segments: tuple[messages.SegmentInfo, ...]
    fds: tuple[int, ...]
