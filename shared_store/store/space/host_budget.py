"""The budget of host memory for copies of what left a GPU (``WOOLY_HOST_BUDGET``), and the tier of a new host copy.

Counts host copies of segments, and what workloads of GPUs report as private memory of ``cpu``. It is no limit of what
exists: copies that clients need are never dropped for it. What does not fit lies in files.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.base.errors import OutOfMemoryError
from shared_store.memory import Unknown
from shared_store.store.devices.devices import Devices
from shared_store.store.space.admission import Admission
from shared_store.store.space.evictor import Evictor
from shared_store.store.state.residency import FILES, HOST
from shared_store.store.state.store_state import StoreState


@dataclass(frozen=True, eq=False)
class HostBudget:
    """Decides where new host copies are allocated. ``nbytes``: the budget; None: there is none."""

    _state: StoreState
    _devices: Devices
    _admission: Admission
    _evictor: Evictor
    nbytes: int | None

    def missing(self, needed: int) -> int:
        """Return how many of ``needed`` bytes exceed the budget; 0 or less: none."""
        return 0 if self.nbytes is None else self.used() + needed - self.nbytes

    def used(self) -> int:
        """Return the bytes that count for the budget."""
        private = sum(
            workload.private.get(HOST, 0)
            for workload in self._state.workloads.all()
            if any(device != HOST for device in workload.private)
        )
        return self._state.tiers.copy_bytes(HOST) + private

    def tier(self, device: str, needed: int, key: str) -> str:
        """Return the tier for new host copies of segments of a device, and free memory for them there.

        Host memory for a GPU, unless they exceed its budget or limit although spare copies were dropped and models
        evicted; else files.
        """
        if device == HOST:
            return FILES
        if (missing := self.missing(needed)) > 0:
            self._evictor.drop_spare_host_copies(missing, HOST)
        if self.missing(needed) > 0:
            return FILES
        try:
            self._admission.admit(HOST, needed, key)
        except OutOfMemoryError:
            return FILES
        return HOST

    async def tier_ahead(self, device: str, needed: int) -> str:
        """Return the tier for host copies that are made ahead, and take nothing from others.

        Raises:
            OutOfMemoryError: they do not fit.
        """
        tier = FILES if device == HOST else HOST
        free = await self._devices.free_bytes(tier)
        fits = not isinstance(free, Unknown) and free >= needed
        if tier == HOST:
            fits = fits and self.missing(needed) <= 0 and self._state.segments.missing(HOST, needed) <= 0
        if not fits:
            raise OutOfMemoryError(f"host copies of {needed} bytes do not fit beside what others have")
        return tier
