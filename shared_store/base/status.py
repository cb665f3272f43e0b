"""The store's status: one immutable snapshot for the command line, the metrics and programs that read its JSON.

``wooly status --json`` prints it. Fields may be added under the same schema name. A field whose meaning changes gets a
new name. All sizes are in bytes, all durations in seconds.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from shared_store.base.workloads import WorkloadStatus

SCHEMA: Final = "wooly.status/1"

LATENCY_BOUNDS_S: Final = (0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 600.0)
"""Upper bounds in seconds of the classes of request durations. Another class has no bound."""


PAUSE_BOUNDS_S: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5)
"""Upper bounds in seconds of the classes of pauses. Another class has no bound."""


class NodeStatus(msgspec.Struct, frozen=True):
    """The machine. ``id`` is stable over restarts of the store."""

    id: str
    hostname: str
    runtime_dir: str


class StoreStatus(msgspec.Struct, frozen=True):
    """The store's process.

    ``degraded``: it serves, but the catalog or the keeper does not. ``recovering``: it was restarted, and the grace
    period for its clients is not over.
    """

    pid: int
    version: str
    uptime_s: float
    state: Literal["ok", "degraded"]
    reasons: tuple[str, ...] = ()
    recovering: bool = False


class KeeperStatus(msgspec.Struct, frozen=True):
    """The store's parent. ``restarts``: number of restarts of the store. ``journal``: ``degraded`` if not written."""

    pid: int
    state: Literal["ok", "gone"]
    restarts: int
    journal: Literal["ok", "degraded"]


class CatalogStatus(msgspec.Struct, frozen=True):
    """The catalog's Redis or Valkey server. The URL is without credentials."""

    url: str
    state: Literal["ok", "down"]


class DeviceStatus(msgspec.Struct, frozen=True, gc=False):
    """Memory that the store has allocated on one device. ``id``: ``cpu`` or a GPU's UUID.

    ``dead_bytes``: bytes of blobs that are no longer referenced. ``padding_bytes``: bytes between blobs and at the ends
    of segments, whose sizes are multiples of 2 MiB. ``releasing_bytes``: bytes of released segments that the keeper has
    not confirmed to have closed, so that their memory may still be allocated. They are not resident. ``host_bytes``:
    bytes of host copies of the device's segments; they are resident bytes of ``cpu``. ``disk_bytes``: bytes of those
    that are files of the swap directory.

    ``budget_bytes``: what all workloads may use together, private and shared. ``reserve_bytes``: kept free.
    ``free_bytes``: could be granted now, beside the reserve. ``granted_bytes``: granted and not yet allocated.
    ``foreign_bytes``: used by processes that are no workloads of this store. None where unknown. ``overcommit``: this
    store grants the device's memory; else ``overcommit_refusal`` says why not.
    """

    id: str
    resident_bytes: int
    limit_bytes: int | None
    segments: int
    dead_bytes: int = 0
    padding_bytes: int = 0
    releasing_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    budget_bytes: int | None = None
    reserve_bytes: int = 0
    free_bytes: int | None = None
    granted_bytes: int = 0
    foreign_bytes: int | None = None
    overcommit: bool = False
    overcommit_refusal: str = ""


class ModelStatus(msgspec.Struct, frozen=True, gc=False):
    """One model.

    ``unique_bytes``: bytes of blobs that no other committed model has. ``last_used``: Unix time in seconds at which a
    reader last attached or left; 0 before the first.

    ``readers``: clients that map it. ``away``: readers that sleep. ``resident_bytes``, ``host_bytes`` and
    ``disk_bytes``: bytes of its blobs on its device, in host copies, and in files alone. A blob may be resident and in
    a host copy.
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
    away: int = 0
    resident_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0


class QuarantineStatus(msgspec.Struct, frozen=True, gc=False):
    """A segment with wrong bytes, which lives until its readers unmap it.

    ``models``: keys of the withdrawn models, which can be published again. ``readers``: number of clients that map it.
    """

    device: str
    segment: int
    bytes: int
    models: tuple[str, ...]
    readers: int


class ActivityStatus(msgspec.Struct, frozen=True, gc=False):
    """Work of a client, as it writes it into its activity page.

    ``busy``: a step runs, or requests are left. ``idle_s``: seconds since its last step ended; None before the first.
    """

    busy: bool
    idle_s: float | None
    running: int
    waiting: int


class ClientStatus(msgspec.Struct, frozen=True, gc=False):
    """One lease: a client, and a model that it publishes, reads or waits for; without a model, ``key`` is empty.

    ``mapped_bytes``: bytes of shared blobs that the client maps. ``private_bytes``: bytes of its private copies, as the
    client reports them. ``away``: a reader that sleeps and maps nothing. ``pid`` is 0, and ``pid_known`` false, for a
    process of another PID namespace. From ``workload`` to ``container`` the client describes itself. ``activity`` is
    None for a client without an activity page, and where the page has no valid content.
    """

    id: int
    pid: int
    uid: int
    name: str
    key: str
    role: Literal["publisher", "reader", "waiting", "idle"]
    mapped_bytes: int
    private_bytes: int
    pid_known: bool = True
    workload: str = ""
    kind: str = "other"
    priority: int = 0
    swap: bool = True
    gpus: tuple[str, ...] = ()
    namespace: str = ""
    pod: str = ""
    container: str = ""
    activity: ActivityStatus | None = None
    away: bool = False


class Counters(msgspec.Struct, frozen=True):
    """Events since the store started.

    ``unconfirmed_releases``: segments whose release the keeper did not confirm in time.
    """

    attaches: int = 0
    publishes: int = 0
    aborted_publishes: int = 0
    fallbacks: int = 0
    protocol_errors: int = 0
    evictions: int = 0
    compactions: int = 0
    quarantines: int = 0
    unconfirmed_releases: int = 0
    permission_denials: int = 0
    sleeps: int = 0
    wakes: int = 0
    returns: int = 0


class RequestStatus(msgspec.Struct, frozen=True, gc=False):
    """Requests of one kind that were answered since the store started. Waiting for other clients is included.

    ``classes``: number of requests by duration, one class for each of :data:`LATENCY_BOUNDS_S` (above the previous
    bound, up to this one), and one for longer requests.
    """

    name: str
    count: int
    total_s: float
    classes: tuple[int, ...]


class PauseStatus(msgspec.Struct, frozen=True):
    """Pauses of one kind since the store started.

    ``classes``: number of pauses by duration, one class for each of :data:`PAUSE_BOUNDS_S` (above the previous bound,
    up to this one), and one for longer pauses.
    """

    count: int
    total_s: float
    longest_s: float
    classes: tuple[int, ...]


class LoopStatus(msgspec.Struct, frozen=True):
    """The store's event loop since it started: while a callback runs, no other client is answered.

    ``callbacks``: their wall time. ``collections``: pauses for garbage collection, which are part of callbacks.
    ``longest_callback``: the name of the longest. ``longest_cpu_s``: the most CPU time of the thread that one took.
    """

    callbacks: PauseStatus
    collections: PauseStatus
    longest_callback: str = ""
    longest_cpu_s: float = 0.0


class DurationStatus(msgspec.Struct, frozen=True, gc=False):
    """Durations of one kind since the store started.

    ``name``: a step of a swap, or a priority (``0`` to ``4``). ``classes``: number of durations, one class for each of
    :data:`LATENCY_BOUNDS_S` (above the previous bound, up to this one), and one for longer ones.
    """

    name: str
    count: int
    total_s: float
    classes: tuple[int, ...]


class SwapStatus(msgspec.Struct, frozen=True, gc=False):
    """Swaps in one direction since the store started. ``bytes``: copied between devices and the host."""

    direction: Literal["out", "in"]
    count: int
    bytes: int


class RefusalStatus(msgspec.Struct, frozen=True, gc=False):
    """Requests to leave that were refused since the store started. ``reason``: the code of an error."""

    reason: str
    count: int


class OvercommitStatus(msgspec.Struct, frozen=True):
    """Overcommit since the store started.

    ``steps``: how long the parts of swaps took. ``waits``: how long workloads waited for memory until they were granted
    it or gave up, by priority. ``waiting``: number of workloads that wait now, by priority (P0 first).
    """

    swaps: tuple[SwapStatus, ...] = ()
    steps: tuple[DurationStatus, ...] = ()
    waits: tuple[DurationStatus, ...] = ()
    waiting: tuple[int, ...] = (0, 0, 0, 0, 0)
    refusals: tuple[RefusalStatus, ...] = ()


class ArbiterStatus(msgspec.Struct, frozen=True):
    """The store's arbiter, which lets workloads of one device compute in turn.

    ``state``: ``ok``; ``idle``: no workload has needed it yet; ``lost``: it ended, and is started again after a while;
    meanwhile workloads compute freely. ``pid``: 0 without a process. ``restarts``: how often it was started again since
    the store started. ``max_hold_s``: seconds after which a workload that is held makes one step; 0: it makes none.
    """

    state: Literal["ok", "idle", "lost"]
    pid: int = 0
    restarts: int = 0
    max_hold_s: float = 0.0


class Totals(msgspec.Struct, frozen=True):
    """Sums. ``saved_bytes``: bytes that readers map, minus one copy of every distinct blob of these."""

    resident_bytes: int
    mapped_bytes: int
    saved_bytes: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the store reports about itself, at one moment."""

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
    loop: LoopStatus | None = None
    workloads: tuple[WorkloadStatus, ...] = ()
    overcommit: OvercommitStatus = OvercommitStatus()
    arbiter: ArbiterStatus | None = None
