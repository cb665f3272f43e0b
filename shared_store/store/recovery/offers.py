"""Handlers of ``Rejoin`` and ``Offer``: clients bring models back to a restarted store.

A client's host memory is accepted once it is sealed and its digests match. The store cannot read a GPU's memory, so
there only clients of the store's own user are trusted, and only as far as the journal does not contradict them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping

from shared_store.base.errors import (
    DigestMismatchError,
    ModelNotFoundError,
    OfferRefusedError,
    PermissionDeniedError,
    WoolyError,
)
from shared_store.base.manifest import Blob
from shared_store.memory import Backend, FdSegment, is_memory_file
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFd, OwnedFds, duplicate
from shared_store.store.devices.devices import Devices
from shared_store.store.devices.digest_check import Check, Part
from shared_store.store.effects import Effects
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.recovery.arrivals import Arrivals
from shared_store.store.recovery.offered import OfferedModel, check_memory
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.residency import BELOW, FILES, HOST
from shared_store.store.state.segment_entry import new_id
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)


class Offers:
    """Models that clients bring back."""

    def __init__(
        self,
        state: StoreState,
        devices: Devices,
        effects: Effects,
        keeper: KeeperLink,
        signals: Signals,
        arrivals: Arrivals,
    ) -> None:
        self._state = state
        self._devices = devices
        self._effects = effects
        self._keeper = keeper
        self._signals = signals
        self._arrivals = arrivals
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def being_offered(self) -> set[str]:
        """Return the keys of models whose offers are being verified."""
        return {key for key, lock in self._locks.items() if lock.locked()}

    async def rejoin(self, session: Session, request: messages.Rejoin) -> Answer:
        """Make a client a reader of a model that it has mapped since before this store started, or asleep.

        Raises:
            ModelNotFoundError: the store does not have the model, has it in other segments or not on its device, or has
                no host copies for a client that sleeps.
        """
        if request.away:
            self._rejoin_asleep(session, request.key, request.segments, request.private_bytes, whole=True)
        else:
            self._rejoin(session, request.key, set(request.segments), request.private_bytes)
        return Answer(messages.Done(request.id))

    async def offer(self, session: Session, request: messages.Offer, fds: OwnedFds) -> Answer:
        """Take a model back from a client, which reads it from then on. The descriptors stay owned by the caller.

        Raises:
            OfferRefusedError: the offer contradicts itself, the journal, or the store.
            DigestMismatchError: bytes do not match their digests.
            MemoryBackendError: a descriptor is not a sealed segment.
            PermissionDeniedError: the memory cannot be verified, and the client is another user's.
        """
        client = session.client
        try:
            await self._take(session, request, fds)
        except WoolyError as error:
            log.warning("refused the offer of %s by %s: %s", request.key, client, error)
            self._signals.event("offer_refused", key=request.key, reason=f"{error.code}: {error}", pid=client.pid)
            raise
        return Answer(messages.Done(request.id))

    def _rejoin(self, session: Session, key: str, segments: set[int], private_bytes: int) -> None:
        state = self._state
        if key not in state.committed or segments != set(state.segments_of(key)) or not state.resident(key):
            raise ModelNotFoundError(f"the store does not have {key} in these segments")
        if not session.gone.is_set():
            state.read_again(session.client, key, private_bytes)
            self._signals.changed()

    def _rejoin_asleep(
        self, session: Session, key: str, segments: Iterable[int], private_bytes: int, *, whole: bool
    ) -> None:
        """Make a client a reader that is away. ``whole``: only if all of the model has host copies."""
        state = self._state
        if key not in state.committed or (whole and state.tiers.without_host_copy(state.segments_of(key))):
            raise ModelNotFoundError(f"the store does not have host copies of {key}")
        if not session.gone.is_set():
            self._effects.carry_out(state.sleep_again(session.client, key, private_bytes, segments))
            self._signals.changed()

    async def _take(self, session: Session, request: messages.Offer, fds: OwnedFds) -> None:
        state, key = self._state, request.key
        offered = _read(request, len(fds))
        offered.check_against(state.grace)
        ids = set(offered.segments)
        async with self._locks[key]:  # of several clients that offer a model, the first valid offer is taken
            known = key in state.committed
            if known and not request.away and state.resident(key):
                self._rejoin_known(session, request, ids)
                return
            if not known and state.models.get(key) is not None:
                raise OfferRefusedError(f"{key} is being published by another client")
            if not known:
                self._arrivals.expect(key)  # opens wait for the result from here on
            try:
                given = dict(zip(offered.segments, fds, strict=True))
                await self._verify(session, offered, given, away=request.away)
                self._take_memory(offered, given, away=request.away)
                known = key in state.committed  # it may have been removed meanwhile
                if not known:
                    state.readmit(offered.data, offered.manifest, offered.locations, pinned=state.grace.pinned(key))
                self._signals.changed()
            finally:
                self._arrivals.settled(key)
            self._keeper.note(key)
            state.grace.extend()
            if not known:
                self._signals.event("model_returned", key=key, pid=session.client.pid)
                log.info("%s brought %s back", session.client, offered.manifest.name)
            if request.away:
                self._rejoin_asleep(session, key, ids, request.private_bytes, whole=False)
            elif known:
                self._rejoin_known(session, request, ids)
            else:
                self._rejoin(session, key, set(state.segments_of(key)), request.private_bytes)
            self._effects.carry_out(state.sweep(ids))
        await self._keeper.flushed()

    def _rejoin_known(self, session: Session, request: messages.Offer, ids: set[int]) -> None:
        """Make a client a reader of a model that the store has. Raises :class:`OfferRefusedError`."""
        try:
            self._rejoin(session, request.key, ids, request.private_bytes)
        except ModelNotFoundError as error:
            raise OfferRefusedError(f"the store has {request.key} in other segments by now") from error

    def _take_memory(self, offered: OfferedModel, given: Mapping[int, OwnedFd], *, away: bool) -> None:
        """Take the verified memory that the store does not have: of the model's device, or host copies.

        A client of an earlier version that sleeps with a model of ``cpu`` has the segments themselves.
        """
        segments, device = self._state.segments, offered.manifest.device
        for number, nbytes in offered.segments.items():
            memory = FdSegment(given[number].dup(), nbytes)
            tier = _tier(given[number].fileno()) if away else device
            if tier != device:
                if not segments.has(number):
                    segments.take_back_elsewhere(number, device, nbytes, tier)
                entry = segments.at(number)
                if entry.host is None and not entry.quarantined:
                    host = new_id()
                    self._devices.put(host, tier, memory)
                    segments.take_back(host, tier, nbytes)
                    segments.add_host_copy(number, host)
                    continue
            elif not segments.has(number):
                self._devices.put(number, device, memory)
                segments.take_back(number, device, nbytes)
                continue
            elif segments.at(number).residency in BELOW:
                self._devices.put(number, device, memory)
                segments.offered(number)
                continue
            memory.release()

    async def _verify(self, session: Session, offered: OfferedModel, fds: Mapping[int, OwnedFd], *, away: bool) -> None:
        """Verify the offered segments; those that the store has are verified in place of the offered ones."""
        device, key = offered.manifest.device, offered.manifest.key
        if away:
            self._present(offered)
            await self._devices.find(device)
            await self._devices.find(HOST)
            copies = {number: (self._devices.backend(_tier(fd.fileno())), fd.fileno()) for number, fd in fds.items()}
            self._check_trusted(session, (backend for backend, _ in copies.values()))
            await asyncio.to_thread(_verify, offered, copies)
            self._present(offered)
            return
        backend = await self._devices.find(device)
        if not backend.host_readable and session.client.uid not in {os.getuid(), 0}:
            raise PermissionDeniedError(f"memory of {device} cannot be checked, so only uid {os.getuid()} may offer it")
        if not backend.host_readable and self._state.grace.forgotten(key):
            raise OfferRefusedError(f"{key} was withdrawn before the restart, and its memory cannot be verified")
        checked = None
        while checked != (present := self._present(offered)):  # other offers may have changed it meanwhile
            checked = present
            with self._devices.export_all(present) as own:
                given = {number: (backend, fd.fileno()) for number, fd in fds.items()}
                given |= {number: (backend, fd) for number, fd in zip(present, own.filenos(), strict=True)}
                await asyncio.to_thread(_verify, offered, given)

    def _check_trusted(self, session: Session, backends: Iterable[Backend]) -> None:
        """Raise :class:`PermissionDeniedError` for files of other users: they could change after their verification."""
        files = any(backend.device == FILES for backend in backends)
        if files and session.client.uid not in {os.getuid(), 0}:
            raise PermissionDeniedError(f"files can change, so only uid {os.getuid()} may offer them")

    def _present(self, offered: OfferedModel) -> tuple[int, ...]:
        """Return the offered segments that the store has. Raises :class:`OfferRefusedError` where they differ."""
        present = []
        for number, nbytes in offered.segments.items():
            if self._state.segments.has(number):
                entry = self._state.segments.at(number)
                if (entry.device, entry.nbytes, entry.writer) != (offered.manifest.device, nbytes, None):
                    raise OfferRefusedError(f"segment {number} is another segment in this store")
                if self._devices.memory(number) is not None:
                    present.append(number)
        return tuple(present)


def _read(request: messages.Offer, fds: int) -> OfferedModel:
    """Read the offered model, which came with this number of descriptors. Raises :class:`OfferRefusedError`."""
    ids = [segment.id for segment in request.segments]
    if fds != len(ids) or len(set(ids)) != len(ids) or any(segment.promised for segment in request.segments):
        raise OfferRefusedError(f"{len(ids)} segments with {fds} descriptors")
    if any(not 0 <= place.segment < len(ids) for place in request.places):
        raise OfferRefusedError("a blob's location is in a segment that is not offered")
    locations = tuple((ids[place.segment], place.offset) for place in request.places)
    sizes = {segment.id: segment.nbytes for segment in request.segments}
    return OfferedModel.read(request.key, request.manifest, locations, sizes)


def _tier(fd: int) -> str:
    """Return the device of a host copy that a client offers."""
    return HOST if is_memory_file(fd) else FILES


def _verify(offered: OfferedModel, given: Mapping[int, tuple[Backend, int]]) -> None:
    """Verify segments against the offered model's digests; runs in a thread.

    ``given``: backend and descriptor of each segment.

    Raises:
        DigestMismatchError: a blob's bytes do not match.
        MemoryBackendError: a descriptor is not a sealed segment.
    """
    parts: list[Part] = []
    placed = list(zip(offered.manifest.blobs, offered.locations, strict=True))
    with contextlib.ExitStack() as held:
        for number, nbytes in offered.segments.items():
            backend, fd = given[number]
            check_memory(backend, fd, nbytes)
            if backend.host_readable:
                memory = FdSegment(duplicate(fd), nbytes)
                held.callback(memory.release)
                blobs = {(blob, at) for blob, (segment, at) in placed if segment == number}
                parts.append((backend, memory, sorted(blobs, key=_offset)))
        wrong = Check(parts).wrong()
    if wrong:
        blob, found = wrong[0]
        raise DigestMismatchError(f"bytes offered as {blob.digest.hex()[:16]} are {found.hex()[:16]}: not accepted")


def _offset(placed: tuple[Blob, int]) -> int:
    return placed[1]
