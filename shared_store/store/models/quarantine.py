"""Handler of ``Quarantine``: a client found resident blobs whose bytes do not match their digests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from shared_store.base.errors import ModelNotFoundError
from shared_store.base.manifest import Blob
from shared_store.protocol import messages
from shared_store.store.devices.devices import Devices
from shared_store.store.effects import Effects
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.blobs import BlobEntry
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Quarantining:
    """Quarantines segments that have wrong bytes."""

    _state: StoreState
    _devices: Devices
    _effects: Effects
    _signals: Signals

    async def quarantine(self, session: Session, request: messages.Quarantine) -> Answer:
        """Stop sharing the segments of the named blobs.

        Where the host can read the memory, only segments that the store finds wrong; elsewhere an
        administrator is trusted.

        Raises:
            ModelNotFoundError: the model is not committed.
            PermissionDeniedError: the store cannot verify the claim of another user's client.
        """
        known = self._state.committed.get(request.key)
        if known is None:
            raise ModelNotFoundError(f"no model with key {request.key}; `wooly models` lists them")
        device = known.manifest.device
        named = {blob.digest for blob in known.manifest.blobs}.intersection(request.digests)
        present = self._state.segments.blobs.present(device, named)
        # What is elsewhere was verified by the store when its host copy was made.
        elsewhere = self._state.segments.elsewhere
        suspects = {digest: entry for digest, entry in present.items() if entry.segment not in elsewhere}
        segments = {digest: entry.segment for digest, entry in suspects.items()}
        if (await self._devices.find(device)).host_readable:
            wrong = await asyncio.to_thread(self._devices.check(_by_segment(suspects)).wrong)
            bad = {segments[blob.digest] for blob, _ in wrong}
        else:
            session.require_admin(f"have memory of {device} quarantined, which the store cannot verify")
            bad = set(segments.values())
        if bad:
            self.stop_sharing(device, bad, pid=session.client.pid)
        else:
            log.warning("%s reported wrong bytes of %s, but they match their digests", session.client, request.key)
        return Answer(messages.Done(request.id))

    def stop_sharing(self, device: str, segments: Iterable[int], *, pid: int) -> None:
        """Quarantine segments, and withdraw the models that have blobs there; readers keep their mappings."""
        done = self._state.quarantine(segments)
        for segment in done.segments:
            log.error("quarantined segment %d of %s: it has wrong bytes", segment, device)
            self._signals.event("quarantined", device=device, segment=segment, pid=pid)
        for model in done.withdrawn:
            self._signals.event("withdrawn", key=model.manifest.key, name=model.manifest.name)
        self._effects.carry_out(done.effects)
        self._signals.changed()


def _by_segment(suspects: dict[bytes, BlobEntry]) -> dict[int, list[tuple[Blob, int]]]:
    found: dict[int, list[tuple[Blob, int]]] = {}
    for digest, entry in suspects.items():
        found.setdefault(entry.segment, []).append((Blob(digest, entry.nbytes), entry.offset))
    return found
