"""Format workloads, and the memory that they share, as tables. Importing this module imports rich."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shared_store.base.status import DeviceStatus
from shared_store.base.workloads import ComputeStatus, WorkloadStatus
from shared_store.cli.render import duration, plain, size, table

NONE = "the store has no workloads; an engine with `--load-format wooly` is one"


def report(rows: Sequence[WorkloadStatus], devices: Sequence[DeviceStatus]) -> Group:
    """Format the accounts of devices, the workloads, and the reasons of those that wait or are never swapped out."""
    parts: list[RenderableType] = []
    if any(device.budget_bytes is not None or device.overcommit_refusal for device in devices):
        parts += [accounts(devices), Text()]
    parts.append(workloads(rows) if rows else Text(NONE))
    notes = [
        *(_note(row) for row in rows),
        *(_compute_note(row) for row in rows),
        *(_device_note(device) for device in devices),
    ]
    shown = [Text(plain(note)) for note in notes if note]
    return Group(*parts, *([Text(), *shown] if shown else ()))


def accounts(rows: Sequence[DeviceStatus]) -> Table:
    """Format the accounts of devices, one a row."""
    return table(
        ("DEVICE", ">BUDGET", ">RESERVE", ">FREE", ">GRANTED", ">FOREIGN", "OVERCOMMIT"),
        [
            (
                *(row.id, _known(row.budget_bytes), size(row.reserve_bytes), _known(row.free_bytes)),
                *(size(row.granted_bytes), _known(row.foreign_bytes), "yes" if row.overcommit else "no"),
            )
            for row in rows
        ],
    )


def workloads(rows: Sequence[WorkloadStatus]) -> Table:
    """Format workloads, one a row; with what they compute, if the store has an arbiter."""
    computes = any(row.compute is not None for row in rows)
    return table(
        (
            *("WORKLOAD", "KIND", ">PID", "DEVICE", "PRIO", "STATE", ">PRIVATE", ">SHARED", ">AWAY"),
            *("ACTIVITY", ">SWAPS", "WAITS FOR"),
            *((">SHARE", ">USED", ">DEVICE TIME", ">HELD") if computes else ()),
        ),
        [
            (
                *(
                    row.name,
                    row.kind,
                    process(row),
                    ", ".join(short_device(memory.device) for memory in row.memory) or "-",
                ),
                *(f"P{row.priority}", state(row)),
                *(size(nbytes) for nbytes in totals(row)),
                *(activity(row), str(row.swaps), ", ".join(row.blocked_by) or "-"),
                *(compute(row.compute) if computes else ()),
            )
            for row in rows
        ],
    )


def totals(row: WorkloadStatus) -> tuple[int, int, int]:
    """Return private and shared bytes on all devices, and private bytes that it has when it is resident and lacks."""
    private, shared = sum(one.private for one in row.memory), sum(one.shared for one in row.memory)
    return private, shared, sum(max(0, one.needs - one.private) for one in row.memory)


def state(row: WorkloadStatus) -> str:
    """Format the state: with ``starting`` before the first time that it is resident, and ``held`` while it is."""
    if row.starting:
        return f"{row.state}, starting"
    return f"{row.state}, held" if row.compute is not None and row.compute.held else row.state


def compute(found: ComputeStatus | None) -> tuple[str, str, str, str]:
    """Format the share, what was used of the devices' time in the last seconds, and the times in all.

    A device time with a part that was estimated begins with ``~``.
    """
    if found is None:
        return ("-", "-", "-", "-")
    share = f"{found.share:g}%" if found.share else "equal"
    return (
        "exclusive" if found.exclusive else share,
        f"{found.used_share:.0%}",
        f"{'~' if found.estimated_s else ''}{duration(found.device_s)}",
        duration(found.held_s),
    )


def process(row: WorkloadStatus) -> str:
    """Format the process: its pid; in another PID namespace its pod, or ``unknown``."""
    if row.pid_known:
        return str(row.pid)
    return "/".join(part for part in (row.namespace, row.pod, row.container) if part) or "unknown"


def activity(row: WorkloadStatus) -> str:
    """Format the requests, or how long it has had none; ``-`` if it does not say."""
    if row.busy or row.running or row.waiting:
        return f"{row.running} run, {row.waiting} wait"
    return "-" if row.idle_s is None else f"idle {duration(row.idle_s)}"


def short_device(device: str) -> str:
    """Return the first part of a GPU's UUID, as people compare it with `nvidia-smi -L`; other names as they are."""
    kind, dash, number = device.partition("-")
    return f"{kind}-{number.partition('-')[0]}" if dash and kind in {"GPU", "MIG"} else device


def _note(row: WorkloadStatus) -> str:
    if row.waits_s > 0:
        return f"{row.name} has waited {duration(row.waits_s)} for memory: `wooly why {row.name}`"
    return "" if row.swappable else f"{row.name} is never swapped out: {row.refusal or 'no reason given'}"


def _compute_note(row: WorkloadStatus) -> str:
    if row.compute is None:
        return ""
    if row.compute.stalled:
        return f"{row.name} has work and makes no progress: no other workload waits for it"
    if row.compute.held:
        return f"{row.name} is held: `wooly why {row.name}`"
    return f"{row.name} is not held: {row.compute.ungated}" if row.compute.ungated else ""


def _device_note(row: DeviceStatus) -> str:
    return f"{row.id} is not overcommitted: {row.overcommit_refusal}" if row.overcommit_refusal else ""


def _known(nbytes: int | None) -> str:
    if nbytes is None:
        return "unknown"
    return size(nbytes) if nbytes >= 0 else f"-{size(-nbytes)}"
