"""Handlers for readers that sleep: host copies are made once for all users of a segment, and readers go away.

Clients copy a GPU's memory, which the store cannot read. The store copies host memory to files itself, so no client
gets a descriptor with which it could change such a copy.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass

from shared_store.base.errors import (
    ConfigError,
    ConnectionLostError,
    DigestMismatchError,
    ModelNotFoundError,
    OutOfMemoryError,
    ProtocolError,
)
from shared_store.memory import Segment
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.store.devices.devices import Devices
from shared_store.store.effects import Effects
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.models.file_copies import FileCopies
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.space.admission import Admission
from shared_store.store.space.host_budget import HostBudget
from shared_store.store.state.residency import FILES, HOST
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.tiers import HostCopying

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ResidencyRequests:
    """Host copies, and readers that sleep."""

    _state: StoreState
    _devices: Devices
    _effects: Effects
    _signals: Signals
    _keeper: KeeperLink
    _admission: Admission
    _budget: HostBudget
    _file_copies: FileCopies

    async def copy_to_host(self, session: Session, request: messages.CopyToHost) -> Answer:
        """Answer with the host copies of a model. Those that do not exist are promised, or made here as files.

        Raises:
            ModelNotFoundError: the client does not read the model.
            OutOfMemoryError: host memory, or the store's limit for it, or the disk is too small.
            ConfigError: there is no swap directory.
            DigestMismatchError, MemoryBackendError: a file has not the bytes that it should have.
            ConnectionLostError: the client disconnected while it waited.
            RequestCancelledError: the client cancelled the request while it waited.
            MemoryBackendError: a descriptor cannot be duplicated.
        """
        state, key, client = self._state, request.key, session.client.number
        await self._devices.find(HOST)
        if self._away_with_copies(session, key):
            return self._answer(request.id, key)
        segments = await self._settled(session, key, compact=not request.ahead)
        missing = state.tiers.without_host_copy(segments)
        needed = sum(state.segments.at(segment).nbytes for segment in missing)
        device = state.committed[key].manifest.device
        tier = FILES
        if missing and request.ahead:
            tier = await self._budget.tier_ahead(device, needed)
            unchanged = self._segments(session, key) == segments and not state.tiers.being_copied(segments)
            if not unchanged or state.tiers.without_host_copy(segments) != missing:
                raise OutOfMemoryError(f"the segments of {key} changed: ask again")
        # From here on the client needs the copies, so that admission does not drop those that exist.
        self._effects.carry_out(state.need(key, client, segments))
        try:
            if missing:
                if not request.ahead:
                    tier = self._budget.tier(device, needed, key)
                copying = state.tiers.begin_copying(key, client, missing, tier)
                if device == HOST:
                    await self._file_copies.make(copying, session.gone)
                    return await self._added(session, copying, request.id)
            return self._answer(request.id, key)
        except BaseException:
            self._release(session, key)
            raise

    async def _settled(self, session: Session, key: str, *, compact: bool) -> tuple[int, ...]:
        """Return the segments of a model once no client copies them, and with ``compact``, after a compaction for them.

        Raises as :meth:`copy_to_host` does.
        """
        state = self._state
        while True:
            segments = self._segments(session, key)
            if state.tiers.being_copied(segments):
                await self._copies_end(session)
                continue
            missing = state.tiers.without_host_copy(segments)
            if not missing or not compact or state.committed[key].manifest.device == HOST:
                return segments
            await self._admission.compact(HOST, sum(state.segments.at(segment).nbytes for segment in missing))
            compact = False

    async def fill(self, session: Session, request: messages.FillHostCopy) -> Answer:
        """Allocate a promised host copy; answer with its descriptor.

        Raises:
            ProtocolError: the copy is not promised to the client, or is allocated already.
            OutOfMemoryError: host memory is too small.
            ConnectionLostError: the copies were dropped meanwhile, or the client disconnected while it waited.
            MemoryBackendError: the descriptor cannot be duplicated.
        """
        state = self._state
        copying = state.tiers.copying(request.key, session.client.number)
        host = copying.copies.get(request.segment)
        if host is None or state.segments.at(host).allocated:
            raise ProtocolError(f"no host copy of segment {request.segment} is to be allocated")
        device, memory = await self._allocate(session, host, request.key)
        entry = state.segments.at(host) if state.tiers.running(copying) else None
        if entry is None or entry.allocated or entry.device != device:
            self._devices.backend(device).release(memory)
            raise ConnectionLostError(f"the host copies of {request.key} were dropped")
        self._devices.put(host, device, memory)
        try:
            fd = self._devices.export(host, writable=True)
        except BaseException:
            self._devices.release(host)
            raise
        state.segments.fill(host)
        self._signals.changed()
        return Answer(messages.Filled(request.id), OwnedFds([fd]))

    async def _allocate(self, session: Session, host: int, key: str) -> tuple[str, Segment]:
        """Allocate a promised host copy, as a file if host memory turns out to be full; return its device, too.

        Raises as :meth:`fill` does.
        """
        state = self._state
        entry = state.segments.at(host)
        if entry.device == HOST:
            try:
                return HOST, await self._admission.allocate(HOST, entry.nbytes, key, session.gone)
            except OutOfMemoryError:
                if not state.segments.has(host):
                    raise
            state.segments.move_promise(host, FILES)
        if session.client.uid not in {os.getuid(), 0}:
            raise OutOfMemoryError(
                f"no host memory for a host copy of {entry.nbytes} bytes within WOOLY_HOST_BUDGET and the limit of "
                f"{HOST}; a file could be changed by who writes it, so only uid {os.getuid()} may"
            )
        try:
            return FILES, await self._admission.allocate(FILES, entry.nbytes, key, session.gone)
        except (OutOfMemoryError, ConfigError) as error:
            raise OutOfMemoryError(
                f"no host memory for a host copy of {entry.nbytes} bytes within WOOLY_HOST_BUDGET and the limit of "
                f"{HOST}, and no file: {error}"
            ) from error

    async def add(self, session: Session, request: messages.AddHostCopies) -> Answer:
        """Seal and verify the promised host copies, and add them to their segments.

        Raises:
            ProtocolError: no copies were promised, or one is not filled.
            DigestMismatchError: bytes do not match their digests. The copies are dropped.
            MemoryBackendError: a copy is still mapped for writing.
            ModelNotFoundError: the model was withdrawn meanwhile.
        """
        state, key = self._state, request.key
        copying = state.tiers.copying(key, session.client.number)
        if not all(state.segments.at(host).allocated for host in copying.copies.values()):
            raise ProtocolError(f"not all promised host copies of {key} are filled")
        return await self._added(session, copying, request.id)

    async def _added(self, session: Session, copying: HostCopying, request: int) -> Answer:
        """Seal, verify and add copies that are filled. Raises as :meth:`add` does."""
        state, key = self._state, copying.key
        await self._devices.seal(copying.copies.values())
        await self._verify(session, copying)
        self._effects.carry_out(state.end_copying(copying))
        self._signals.changed()
        if state.tiers.without_host_copy(self._segments(session, key)):
            raise ModelNotFoundError(f"segments of {key} were quarantined or replaced while they were copied")
        log.info("%s made %d host copies of %s", session.client, len(copying.copies), key)
        self._keeper.note(key)
        self._signals.changed()
        answer = self._answer(request, key)
        await self._keeper.flushed()
        return answer

    async def go_away(self, session: Session, request: messages.GoAway) -> Answer:
        """Record that a reader sleeps. Its model leaves the device when no other reader is awake.

        Raises:
            ModelNotFoundError: the client does not read the model, or has no host copies of it.
        """
        client, key = session.client, request.key
        effects = self._state.go_away(client, key)
        known = self._state.committed[key].manifest.name if key in self._state.committed else ""
        self._signals.event("model_slept", key=key, name=known, pid=client.pid)
        self._effects.carry_out(effects)
        self._signals.changed()
        return Answer(messages.Done(request.id))

    async def release(self, session: Session, request: messages.ReleaseHostCopies) -> Answer:
        """Record that a client needs no host copies of a model, and abort those that it makes."""
        self._release(session, request.key)
        return Answer(messages.Done(request.id))

    def _release(self, session: Session, key: str) -> None:
        client = session.client.number
        self._effects.carry_out([*self._state.cancel_copying(key, client), *self._state.let_go(key, client)])
        self._signals.changed()

    async def _verify(self, session: Session, copying: HostCopying) -> None:
        """Compare the copies with the digests of the blobs in their segments; drop them where they differ."""
        state = self._state
        contents = {
            host: state.segments.contents(segment)
            for segment, host in copying.copies.items()
            if state.segments.has(segment)
        }
        wrong = await asyncio.to_thread(self._devices.check(contents).wrong)
        if not state.tiers.running(copying):
            raise ConnectionLostError(f"the host copies of {copying.key} were dropped")
        if wrong:
            self._release(session, copying.key)
            blob, found = wrong[0]
            raise DigestMismatchError(
                f"the host copy of blob {blob.digest.hex()[:16]} is {found.hex()[:16]}: not accepted"
            )

    def _away_with_copies(self, session: Session, key: str) -> bool:
        """Whether a client sleeps with a model that has host copies: it asks for their descriptors again."""
        state, client = self._state, session.client.number
        model = state.models.get(key)
        if model is None or key not in state.committed or client not in model.away:
            return False
        return state.tiers.needs(key, client) and not state.tiers.without_host_copy(state.segments_of(key))

    def _segments(self, session: Session, key: str) -> tuple[int, ...]:
        """Return the segments of a model that a client reads. Raises :class:`ModelNotFoundError`."""
        model = self._state.models.get(key)
        if model is None or key not in self._state.committed or session.client.number not in model.awake:
            raise ModelNotFoundError(f"{session.client} does not read {key}")
        return self._state.segments_of(key)

    def _answer(self, request: int, key: str) -> Answer:
        """Describe a model's segments, with a descriptor of each host copy that is complete."""
        state = self._state
        locations = state.locations_of(key)
        segments = tuple(dict.fromkeys(segment for segment, _ in locations))
        index = {segment: number for number, segment in enumerate(segments)}
        places = tuple(messages.BlobPlace(index[segment], offset) for segment, offset in locations)
        promised = set(state.tiers.without_host_copy(segments))
        fds = self._devices.export_all(state.tiers.host_of(one) for one in segments if one not in promised)
        infos = tuple(
            messages.HostSegment(segment, state.segments.at(segment).nbytes, segment in promised)
            for segment in segments
        )
        return Answer(messages.HostCopies(request, places, infos), fds)

    async def _copies_end(self, session: Session) -> None:
        """Wait for a change: a client may end or drop copies. Raises :class:`ConnectionLostError` without a client."""
        await session.first_of(self._signals.next_change())
        if session.gone.is_set():
            raise ConnectionLostError("the client disconnected while it waited")
