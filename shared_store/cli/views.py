"""Format a status as text and tables. Importing this module imports rich."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shared_store.base.status import ActivityStatus, ClientStatus, DeviceStatus, ModelStatus, QuarantineStatus, Status
from shared_store.cli.render import duration, plain, short_key, size, table
from shared_store.cli.workload_views import accounts, workloads


def report(status: Status, *, hide_client: int | None = None) -> Group:
    """Format a whole status. ``hide_client``: the number of the client to leave out (this command)."""
    parts: list[RenderableType] = [Text(plain(line)) for line in _summary(status)]
    parts += [Text(), devices(status.devices)]
    if any(device.budget_bytes is not None for device in status.devices):
        parts += [Text(), accounts(status.devices)]
    if status.workloads:
        parts += [Text(), workloads(status.workloads)]
    if status.models:
        parts += [Text(), models(status.models)]
    if status.quarantine:
        parts += [Text(), quarantine(status.quarantine)]
    shown = [client for client in status.clients if client.id != hide_client]
    if shown:
        parts += [Text(), clients(shown, {model.key: model.name for model in status.models})]
    return Group(*parts)


def _summary(status: Status) -> list[str]:
    store, totals, counters = status.store, status.totals, status.counters
    reasons = f" ({', '.join(store.reasons)})" if store.reasons else ""
    mapped, resident, saved = map(size, (totals.mapped_bytes, totals.resident_bytes, totals.saved_bytes))
    published = f"{counters.publishes} publishes ({counters.aborted_publishes} aborted)"
    failures = f"{counters.fallbacks} fallbacks, {counters.protocol_errors} protocol errors"
    keeper = status.keeper
    supervised = (
        "none" if keeper is None else f"{keeper.state}, pid {keeper.pid}, {keeper.restarts} restarts of the store"
    )
    return [
        f"store    {store.state}{reasons}, pid {store.pid}, wooly {store.version}, up {duration(store.uptime_s)}",
        f"at       {status.node.runtime_dir} on {status.node.hostname}",
        f"keeper   {supervised}",
        f"catalog  {status.catalog.state}, {status.catalog.url}",
        f"shared   {mapped} mapped by clients, {resident} resident, {saved} saved",
        f"events   {published}, {counters.attaches} attaches, {counters.evictions} evictions, {failures}",
        f"sleep    {counters.sleeps} sleeps, {counters.wakes} wakes, {counters.returns} returns to a device",
    ]


def devices(rows: Sequence[DeviceStatus]) -> Table:
    """Format devices, one a row."""
    return table(
        ("DEVICE", ">RESIDENT", ">LIMIT", ">SEGMENTS", ">DEAD", ">PADDING", ">HOST COPIES"),
        [
            (
                row.id,
                size(row.resident_bytes),
                "none" if row.limit_bytes is None else size(row.limit_bytes),
                str(row.segments),
                size(row.dead_bytes),
                size(row.padding_bytes),
                size(row.host_bytes),
            )
            for row in rows
        ],
    )


def models(rows: Sequence[ModelStatus]) -> Table:
    """Format models, one a row."""
    return table(
        (
            *("KEY", "MODEL", "ENGINE", "DEVICE", "STATE", ">TENSORS", ">SIZE", ">UNIQUE"),
            *(">RESIDENT", ">HOST", ">DISK", ">READERS", ">AWAY", "PINNED"),
        ),
        [
            (
                *(short_key(row.key), row.name, row.engine, row.device, row.state),
                *(str(row.tensors), size(row.bytes), size(row.unique_bytes)),
                *(size(row.resident_bytes), size(row.host_bytes), size(row.disk_bytes)),
                *(str(row.readers), str(row.away)),
                "yes" if row.pinned else "no",
            )
            for row in rows
        ],
    )


def quarantine(rows: Sequence[QuarantineStatus]) -> Table:
    """Format quarantined segments, one a row."""
    return table(
        ("QUARANTINED", ">SEGMENT", ">SIZE", "MODELS", ">READERS"),
        [
            (row.device, str(row.segment), size(row.bytes), ", ".join(map(short_key, row.models)), str(row.readers))
            for row in rows
        ],
    )


def clients(rows: Sequence[ClientStatus], names: dict[str, str]) -> Table:
    """Format clients, one row for each model that a client uses. ``names``: names of models by key."""
    return table(
        (">PID", ">UID", "CLIENT", "ROLE", "MODEL", ">MAPPED", ">PRIVATE", "PRIO", "ACTIVITY"),
        [
            (
                *(process(row), str(row.uid), row.name or "-", "away" if row.away else row.role),
                *(names.get(row.key) or short_key(row.key) or "-", size(row.mapped_bytes), size(row.private_bytes)),
                *(f"P{row.priority}", activity(row.activity)),
            )
            for row in rows
        ],
    )


def process(row: ClientStatus) -> str:
    """Format the process of a client: its pid; in another PID namespace its pod, or ``unknown``."""
    if row.pid_known:
        return str(row.pid)
    return "/".join(part for part in (row.namespace, row.pod, row.container) if part) or "unknown"


def activity(found: ActivityStatus | None) -> str:
    """Format the work of a client; ``-`` if it does not say."""
    if found is None:
        return "-"
    if found.busy:
        return f"busy, {found.running} running, {found.waiting} waiting"
    return "idle" if found.idle_s is None else f"idle for {duration(found.idle_s)}"
