"""The store's frozen snapshot: one type feeds the command line, the metrics and any program that reads the JSON.

``wooly status --json`` prints it. Fields are only ever added under one schema name; a changed meaning gets a new one.
All sizes are bytes, all durations seconds.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

SCHEMA: Final = "wooly.status/1"

LATENCY_BOUNDS_S: Final = (0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 600.0)
"""Upper ends of the classes that durations of requests are counted in; one more has no end."""


class NodeStatus(msgspec.Struct, frozen=True):
    """The machine: ``id`` is stable over restarts of the store."""

    id: str
    hostname: str
    runtime_dir: str


class StoreStatus(msgspec.Struct, frozen=True):
    """The store's process. ``degraded``: it serves, but something beside it (the catalog, the keeper) does not.

    ``recovering``: it was restarted a moment ago, and its clients are coming back.
    """

    pid: int
    version: str
    uptime_s: float
    state: Literal["ok", "degraded"]
    reasons: tuple[str, ...] = ()
    recovering: bool = False


class KeeperStatus(msgspec.Struct, frozen=True):
    """The store's parent. ``restarts``: how often it started the store again; ``journal``: whether it is written."""

    pid: int
    state: Literal["ok", "gone"]
    restarts: int
    journal: Literal["ok", "degraded"]


class CatalogStatus(msgspec.Struct, frozen=True):
    """The Redis or Valkey server that the catalog is written to (credentials removed from the URL)."""

    url: str
    state: Literal["ok", "down"]


class DeviceStatus(msgspec.Struct, frozen=True):
    """Memory that the store has allocated on one device; ``id`` is ``cpu`` or a GPU's UUID.

    Of the bytes that no blob uses, ``dead_bytes`` had one; ``padding_bytes`` lie between blobs and at the ends of
    segments, which have whole multiples of 2 MiB.
    """

    id: str
    resident_bytes: int
    limit_bytes: int | None
    segments: int
    dead_bytes: int = 0
    padding_bytes: int = 0


class ModelStatus(msgspec.Struct, frozen=True):
    """One model. ``unique_bytes``: of its blobs, those that no other committed model has.

    ``last_used``: Unix seconds at which a reader came or left last; 0 before the first.
    """

    key: str
    name: str
    engine: str
    device: str
    state: Literal["publishing", "committed"]
    tensors: int
    bytes: int
    unique_bytes: int
    readers: int
    pinned: bool
    last_used: float = 0.0


class QuarantineStatus(msgspec.Struct, frozen=True):
    """A segment with wrong bytes, kept for those who map it.

    ``models``: keys that they read under, which are free for new models; ``readers``: how many clients they are.
    """

    device: str
    segment: int
    bytes: int
    models: tuple[str, ...]
    readers: int


class ClientStatus(msgspec.Struct, frozen=True):
    """One lease: a client and a model that it publishes, reads or (``key`` empty) neither.

    ``mapped_bytes`` are the bytes of shared blobs that it maps; ``private_bytes`` what it says it copied for itself.
    """

    id: int
    pid: int
    uid: int
    name: str
    key: str
    role: Literal["publisher", "reader", "waiting", "idle"]
    mapped_bytes: int
    private_bytes: int


class Counters(msgspec.Struct, frozen=True):
    """Events since the store started."""

    attaches: int = 0
    publishes: int = 0
    aborted_publishes: int = 0
    fallbacks: int = 0
    protocol_errors: int = 0
    evictions: int = 0
    compactions: int = 0
    quarantines: int = 0


class RequestStatus(msgspec.Struct, frozen=True):
    """Requests of one kind that were answered since the store started.

    ``classes``: how many took so long, one for each of :data:`LATENCY_BOUNDS_S` (longer than the one before it, and at
    most this), and one for those that took longer. Waiting for other clients counts.
    """

    name: str
    count: int
    total_s: float
    classes: tuple[int, ...]


class Totals(msgspec.Struct, frozen=True):
    """``saved_bytes``: what the readers map, less one copy of every distinct blob among it."""

    resident_bytes: int
    mapped_bytes: int
    saved_bytes: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the store tells about itself at one moment."""

    schema: Literal["wooly.status/1"] = SCHEMA
    node: NodeStatus
    store: StoreStatus
    catalog: CatalogStatus
    devices: tuple[DeviceStatus, ...]
    models: tuple[ModelStatus, ...]
    clients: tuple[ClientStatus, ...]
    totals: Totals
    counters: Counters
    requests: tuple[RequestStatus, ...] = ()
    keeper: KeeperStatus | None = None
    quarantine: tuple[QuarantineStatus, ...] = ()
