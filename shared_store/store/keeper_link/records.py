"""The durable part of the store's state, in the form of the keeper's records."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.protocol.durable_state import DurableState, RetainedSegment
from shared_store.protocol.keeper_messages import ModelRecord, SegmentRecord
from shared_store.runtime.fds import OwnedFd
from shared_store.store.devices.devices import Devices
from shared_store.store.state.store_state import StoreState


@dataclass(frozen=True, eq=False)
class Records:
    """Reads records from the state, and descriptors from the devices."""

    _state: StoreState
    _devices: Devices

    def model(self, key: str) -> ModelRecord:
        """Return the record of a committed model."""
        model = self._state.models.get(key)
        assert model is not None  # noqa: S101 - it is committed
        data = self._state.committed[key].data
        locations = self._state.locations_of(key)
        return ModelRecord(key, data, locations, pinned=model.pinned, last_used=model.last_used)

    def segment(self, number: int) -> SegmentRecord:
        """Return the record of a segment."""
        entry = self._state.segments.at(number)
        return SegmentRecord(number, entry.device, entry.nbytes, entry.host or 0)

    def allocated(self, number: int) -> bool:
        """Whether a segment has memory of its device, which can be exported."""
        return self._devices.memory(number) is not None

    def export(self, number: int) -> OwnedFd:
        """Return a new descriptor of a segment."""
        return self._devices.export(number)

    def holdings(self) -> DurableState:
        """Return all records, with new descriptors of the segments of committed models and of their host copies.

        The caller closes it.

        Raises:
            MemoryBackendError: a descriptor cannot be duplicated.
        """
        models = {key: self.model(key) for key in self._state.committed}
        held = DurableState(models=models, files=self._state.files.all())
        try:
            for number in {segment for model in models.values() for segment in model.segments}:
                record = self.segment(number)
                for one in filter(None, (number, record.host)):
                    fd = self.export(one) if self.allocated(one) else None
                    held.segments[one] = RetainedSegment(self.segment(one), fd)
        except BaseException:
            held.close()
            raise
        return held
