"""Workloads that have their devices for themselves (``GPU_MODE=Exclusive``)."""

from __future__ import annotations

from collections.abc import Collection

from shared_store.base.errors import ExclusiveError
from shared_store.store.state.workloads import Workloads


def check_exclusive(workloads: Workloads, number: str, name: str, devices: Collection[str], *, exclusive: bool) -> None:
    """Check that a workload may use its devices.

    Args:
        workloads: of the store.
        number: id of the workload.
        name: of the workload.
        devices: that it uses, or will.
        exclusive: whether it would have them for itself.

    Raises:
        ExclusiveError: another workload has one of them for itself, or others use them that this one would have so.
    """
    beside = [one for one in workloads.all() if one.id != number and not set(devices).isdisjoint(one.devices)]
    owners = [one for one in beside if one.exclusive]
    if not owners and not (exclusive and beside):
        return
    shared = sorted({device for one in owners or beside for device in one.devices if device in devices})
    names = ", ".join(one.name for one in owners or beside)
    where = ", ".join(shared)
    if owners:
        raise ExclusiveError(
            f"{name} may not use {where}: {names} has it alone (GPU_MODE=Exclusive). Start on another device, or stop "
            f"{names}, or start it without GPU_MODE=Exclusive"
        )
    raise ExclusiveError(
        f"{name} asks for {where} alone (GPU_MODE=Exclusive), and it is used by: {names}. Stop these, start on another "
        "device, or start without GPU_MODE=Exclusive"
    )
