"""Restores an earlier store's models from its keeper.

Descriptors from the keeper are trusted: an earlier store of the same user sent them. Records that contradict each
other, and segments that do not match their records, are dropped, each with an event.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from shared_store.base.errors import MemoryBackendError, WoolyError
from shared_store.memory import FdSegment
from shared_store.protocol.durable_state import DurableState
from shared_store.runtime.fds import OwnedFd
from shared_store.store.devices.devices import Devices
from shared_store.store.effects import Effects
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.pace import Pace
from shared_store.store.recovery.arrivals import Arrivals
from shared_store.store.recovery.offered import OfferedModel, check_memory
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState

_SEGMENT = 30
"""Units of work for a segment: checking its descriptor takes as long as adding this many blobs."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Restore:
    """Takes the segments and models of an earlier store into the state."""

    _state: StoreState
    _devices: Devices
    _keeper: KeeperLink
    _effects: Effects
    _signals: Signals
    _arrivals: Arrivals

    async def restore(self, held: DurableState) -> None:
        """Take over all that an earlier store left, and its descriptors. Models without segments are awaited.

        In slices of the event loop's time: it may take a second, and signals are handled meanwhile.
        """
        with _without_collections():
            await self._restore(held)

    async def _restore(self, held: DurableState) -> None:
        state, pace = self._state, Pace()
        records = {number: found.record for number, found in held.segments.items()}
        state.grace.begin(held.models, records)
        for number, found in held.segments.items():
            if found.fd is not None:
                self._take_segment(number, found.record.device, found.record.nbytes, OwnedFd(found.fd.detach()))
                await pace.done(_SEGMENT)
        for segment in records.values():
            if segment.host and state.segments.has(segment.host):
                if not state.segments.has(segment.id):
                    tier = records[segment.host].device
                    state.segments.take_back_elsewhere(segment.id, segment.device, segment.nbytes, tier)
                state.segments.add_host_copy(segment.id, segment.host)
        for record in held.models.values():
            try:
                model = OfferedModel.recorded(record, records)
            except WoolyError as error:
                self._keeper.forget(record.key)
                self._dropped("model_dropped", f"{record.key}: {error}")
                continue
            await pace.done(len(model.locations))
            name, manifest = model.manifest.name, model.manifest
            if all(map(state.segments.has, record.segments)):
                state.readmit(model.data, manifest, model.locations, pinned=record.pinned, last_used=record.last_used)
                self._signals.changed()
                log.info("restored %s: %d tensors", name, len(manifest.tensors))
            else:
                state.grace.expect(record.key)
                self._arrivals.expect(record.key)
                log.info("waiting for a client to offer %s", name)
        self._effects.carry_out(state.sweep())
        state.files.add(held.files)

    def _take_segment(self, number: int, device: str, nbytes: int, fd: OwnedFd) -> None:
        """Take over a segment, if it matches its record as far as the host can check."""
        backend = self._devices.backends.get(device)
        if backend is not None and backend.host_readable:
            try:
                check_memory(backend, fd.fileno(), nbytes)
            except MemoryBackendError as error:
                fd.close()
                self._keeper.release(number)
                self._dropped("segment_dropped", f"segment {number}: {error}")
                return
        self._devices.put(number, device, FdSegment(fd, nbytes))
        self._state.segments.take_back(number, device, nbytes)

    def _dropped(self, kind: str, detail: str) -> None:
        log.warning("%s: %s", kind.replace("_", " "), detail)
        self._signals.event(kind, detail=detail)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Disable garbage collection while very many lasting objects are made: it would take most of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
