"""Accounts of devices: what all workloads use together, what is granted, and what is free. Arithmetic, no I/O.

``free = min(budget, physical memory - foreign) - private - segments - grants - reserve``, where *private* is what the
workloads report, *segments* what the store allocated and promised, *grants* what was granted and is not used yet, and
*foreign* what processes use that are no workloads.

How much of its grant a workload uses already is not known until it reports it, so *foreign* is known only within a
range while there are grants: it stays what it was, as far as the range allows.

Only a device's own store grants its memory. A device without an account has no budget here: what its clients allocate,
they allocate as without overcommit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from shared_store.store.state.segments import Segments
from shared_store.store.state.workloads import Workloads

ENDLESS: Final = 1 << 62
"""Free bytes of a device whose memory this store does not grant."""


def _no_reserve(_device: str) -> int:
    return 0


@dataclass(frozen=True)
class MemoryRules:
    """Settings of overcommit that concern the state.

    Attributes:
        budgets: bytes that all workloads may use together on a device; no entry: its physical memory.
        reserve: returns the bytes that stay free on a device.
        max_priority: the highest priority (the lowest number) that a user id may claim.
    """

    budgets: Mapping[str, int] = field(default_factory=dict)
    reserve: Callable[[str], int] = _no_reserve
    max_priority: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceAccount:
    """The account of a device, in bytes.

    Attributes:
        device: ``cpu`` or a GPU's UUID.
        budget: what all workloads may use together, private and shared, the reserve included; None: unknown.
        reserve: what stays free.
        private: what workloads use besides segments.
        segments: allocated, promised, and released but not yet free.
        granted: granted and not used yet.
        free: what could be granted now; negative if the reserve is used; None: unknown.
        foreign: used by processes that are no workloads of this store; None: unknown.
        taken: bytes of the budget that these have.
        refusal: why this store does not grant the device's memory; empty: it does.
    """

    device: str
    budget: int | None
    reserve: int
    private: int
    segments: int
    granted: int
    free: int | None
    foreign: int | None
    taken: int = 0
    refusal: str = ""


class Accounts:
    """The accounts of the devices that workloads have named."""

    def __init__(
        self,
        segments: Segments,
        workloads: Workloads,
        budgets: Mapping[str, int],
        reserve: Callable[[str], int],
    ) -> None:
        """``budgets``: bytes by device, where they are set. ``reserve``: bytes that stay free on a device."""
        self._segments = segments
        self._workloads = workloads
        self._budgets = dict(budgets)
        self._reserve = reserve
        self._total: dict[str, int | None] = {}
        self._foreign: dict[str, int] = {}
        self._refusals: dict[str, str] = {}

    def devices(self) -> list[str]:
        """Return the devices with an account, and those that are refused."""
        return list(dict.fromkeys((*self._total, *self._refusals)))

    def known(self, device: str) -> bool:
        """Whether a device was measured."""
        return device in self._total

    def refusal(self, device: str) -> str:
        """Return why this store does not grant the memory of a device; empty: it does, or has no account of it."""
        return self._refusals.get(device, "")

    def open(self, device: str) -> bool:
        """Whether this store grants the memory of a device."""
        return device in self._total and device not in self._refusals

    def budget(self, device: str) -> int | None:
        """Return the budget of a device: as it was set, else its physical memory; None: unknown."""
        return self._budgets.get(device, self._total.get(device))

    def physical(self, device: str) -> int | None:
        """Return the physical memory of a device, in bytes; None: unknown."""
        return self._total.get(device)

    def measured(self, device: str, free: int | None, total: int | None) -> None:
        """Record the free and the whole memory of a device, in bytes; None: unknown."""
        self._total[device] = total
        if free is None or total is None:
            self._foreign.pop(device, None)
            return
        allocated = self._segments.resident_bytes(device) + self._segments.releases.nbytes(device)
        most = max(0, total - free - self._workloads.private(device) - allocated)
        least = max(0, most - self._workloads.granted(device))
        self._foreign[device] = min(max(self._foreign.get(device, 0), least), most)

    def refuse(self, device: str, reason: str) -> None:
        """Do not grant the memory of a device, for a reason; empty: grant it again."""
        if reason:
            self._refusals[device] = reason
        else:
            self._refusals.pop(device, None)

    def account(self, device: str) -> DeviceAccount:
        """Return the account of a device."""
        budget, total, foreign = self.budget(device), self._total.get(device), self._foreign.get(device)
        private, granted = self._workloads.private(device), self._workloads.granted(device)
        segments, reserve = self._segments.used(device), self._reserve(device)
        limits = [] if budget is None else [budget]
        if total is not None and foreign is not None:
            limits.append(total - foreign)
        free = min(limits) - private - segments - granted - reserve if limits else None
        taken = 0 if budget is None else max(0, budget - min(limits))
        refusal = self.refusal(device)
        return DeviceAccount(device, budget, reserve, private, segments, granted, free, foreign, taken, refusal)

    def free(self, device: str) -> int:
        """Return the bytes that could be granted now, :data:`ENDLESS` where nothing bounds them."""
        if not self.open(device):
            return ENDLESS
        found = self.account(device).free
        return ENDLESS if found is None else found
