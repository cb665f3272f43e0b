"""The answer that lets a client map a committed model."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.protocol import messages
from shared_store.store.devices.devices import Devices
from shared_store.store.effects import Effects
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState


@dataclass(frozen=True, eq=False)
class Attach:
    """Makes `Attached` replies."""

    _state: StoreState
    _devices: Devices
    _effects: Effects
    _signals: Signals

    def attached(self, session: Session, key: str, request: int) -> Answer:
        """Return a committed model's manifest, its blobs' locations, and a descriptor of each segment.

        Args:
            session: of a client that the state has as a reader.
            key: the model's.
            request: id of the request to answer.

        Raises:
            MemoryBackendError: a descriptor cannot be duplicated; the client is no reader any more.
        """
        locations = self._state.locations_of(key)
        segments = tuple(dict.fromkeys(segment for segment, _ in locations))
        try:
            fds = self._devices.export_all(segments)
        except BaseException:
            self._effects.carry_out(self._state.leave(session.client, key))
            self._signals.changed()
            raise
        if self._state.woke(session.client.number, key):
            name = self._state.committed[key].manifest.name
            self._signals.event("model_woke", key=key, name=name, pid=session.client.pid)
        else:
            self._state.counts.add("attaches")
            self._signals.event("attached", key=key, pid=session.client.pid)
        index = {segment: number for number, segment in enumerate(segments)}
        places = tuple(messages.BlobPlace(index[segment], offset) for segment, offset in locations)
        infos = tuple(messages.SegmentInfo(segment, self._state.segments.at(segment).nbytes) for segment in segments)
        return Answer(messages.Attached(request, self._state.committed[key].data, places, infos), fds)
