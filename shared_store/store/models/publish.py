"""Handlers of ``Plan``, ``Fill``, ``Commit`` and ``Abandon``: a publisher writes a model's new blobs and commits it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from shared_store.base import manifest as manifests
from shared_store.base.digest import SIZE
from shared_store.base.errors import DigestMismatchError, NotPublisherError, ProtocolError
from shared_store.base.layout import Layout, Placement
from shared_store.memory import Segment
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.store.devices.devices import Devices
from shared_store.store.effects import Effects
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.models.attach import Attach
from shared_store.store.residency.publishers import Publishers
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.space.admission import Admission
from shared_store.store.space.departures import Departures
from shared_store.store.state.committed import Committed
from shared_store.store.state.publish_plan import Draft, PublishPlan
from shared_store.store.state.store_state import StoreState

log = logging.getLogger(__name__)

LARGE_MANIFEST = 256 << 10
"""Bytes from which a manifest is decoded in a thread: some 3,000 tensors, or 4 ms."""


@dataclass(frozen=True, eq=False)
class Publishing:
    """Publications: from the plan to the commit."""

    _state: StoreState
    _devices: Devices
    _effects: Effects
    _signals: Signals
    _keeper: KeeperLink
    _admission: Admission
    _departures: Departures
    _publishers: Publishers
    _attach: Attach

    async def plan(self, session: Session, request: messages.Plan) -> Answer:
        """Assign a location to each blob; answer with descriptors of the segments that exist.

        Raises:
            NotPublisherError: the client does not publish the model.
            ProtocolError: the model has a plan, or this one is malformed.
            OutOfMemoryError: the plan exceeds the device's limit, and eviction cannot free enough; or its budget, and
                workloads did not leave in time.
            RequestCancelledError: the client cancelled the request while it waited for memory.
            ConnectionLostError: the client disconnected while it waited for memory.
            MemoryBackendError: a descriptor cannot be duplicated.
        """
        state, client = self._state, session.client.number
        device = state.models.publishing(request.key, client).device
        if request.key in state.plans:
            raise ProtocolError(f"{request.key} has a plan already")
        if any(len(blob.digest) != SIZE or blob.nbytes < 0 for blob in request.blobs):
            raise ProtocolError("a plan with a malformed blob")
        preferred = _preferred(request)
        present = state.segments.blobs.present(device, (blob.digest for blob in request.blobs))
        segments = {entry.segment for entry in present.values()}
        await self._departures.returned(segments)
        await self._departures.ended(segments)
        writable = self._devices.backend(device).host_readable  # then the store writes what the client has not
        whole = request.whole or writable

        def needed() -> int:
            return state.draft(request.key, client, request.blobs, preferred, whole=whole).nbytes

        await self._admission.compact(device, needed())
        await self._publishers.admit(session, device, needed)
        session.pending.check()
        # The state may have changed meanwhile.
        draft = state.draft(request.key, client, request.blobs, preferred, whole=whole)
        plan, fds = self._promise(request.key, draft, with_copies=not writable)
        state.plans[request.key] = plan
        state.workloads.published(session.client, plan.token, device, draft.nbytes)
        self._signals.changed()
        used = [*plan.segments, *plan.existing]
        index = {segment: number for number, segment in enumerate(used)}
        places = tuple(
            messages.BlobPlace(index[location.segment], location.offset, location.new) for location in plan.locations
        )
        infos = tuple(
            messages.SegmentInfo(segment, state.segments.at(segment).nbytes, segment in plan.segments)
            for segment in used
        )
        rest = () if writable else _rest(plan, index)
        return Answer(messages.Planned(request.id, places, infos, rest), fds)

    def _promise(self, key: str, draft: Draft, *, with_copies: bool) -> tuple[PublishPlan, OwnedFds]:
        """Admit a draft and promise its segments, or leave no trace of it.

        Returns descriptors of the segments that exist, and ``with_copies`` those of host copies with a rest.
        """
        self._state.segments.refer_known(draft)
        try:
            self._admission.admit(draft.device, draft.nbytes, key)
            plan = self._state.segments.promise_plan(draft)
            copies = [self._state.tiers.host_of(segment) for segment in plan.rest] if with_copies else []
            return plan, self._devices.export_all([*plan.existing, *copies])
        except BaseException:
            self._effects.carry_out(self._state.drop(draft.token))
            raise

    async def fill(self, session: Session, request: messages.Fill) -> Answer:
        """Allocate a promised segment; answer with its descriptor.

        Raises:
            NotPublisherError: the client does not publish the model, or no longer does.
            ProtocolError: the segment is not promised to it, or is allocated already.
            OutOfMemoryError: the device is full, and eviction cannot free enough.
            ConnectionLostError: the client disconnected while it waited for memory.
            MemoryBackendError: the descriptor cannot be duplicated.
        """
        state, key, segment = self._state, request.key, request.segment
        state.models.publishing(key, session.client.number)
        plan = state.plans.get(key)
        if plan is None or segment not in plan.segments:
            raise ProtocolError(f"segment {segment} is not promised to {key}")
        entry = state.segments.at(segment)
        if entry.allocated:
            raise ProtocolError(f"segment {segment} is allocated already")
        memory = await self._admission.allocate(
            entry.device, entry.nbytes, key, session.gone, wanted=lambda: state.plans.get(key) is plan
        )
        try:
            await self._complete(plan, segment, memory)
        except BaseException:
            self._devices.backend(entry.device).release(memory)
            raise
        if state.plans.get(key) is not plan:
            self._devices.backend(entry.device).release(memory)
            raise NotPublisherError(f"client {session.client.number} no longer publishes {key}")
        self._devices.put(segment, entry.device, memory)
        try:
            fd = self._devices.export(segment)
        except BaseException:
            self._devices.release(segment)
            raise
        state.segments.fill(segment)
        self._signals.changed()
        return Answer(messages.Filled(request.id), OwnedFds([fd]))

    async def _complete(self, plan: PublishPlan, segment: int, memory: Segment) -> None:
        """Copy a returning segment's host copy to its new memory, if it has blobs that the publisher has not.

        Only where the store can write to the device. Raises :class:`MemoryBackendError`.
        """
        entry = self._state.segments.at(segment) if self._state.segments.has(segment) else None
        if entry is None or entry.host is None or not plan.rest.get(segment):
            return
        if self._devices.backend(entry.device).host_readable:
            await asyncio.to_thread(self._devices.copying(entry.host, entry.device, memory))

    async def commit(self, session: Session, request: messages.Commit) -> Answer:
        """Seal and verify the new blobs, and make the model visible; the publisher and all waiters read it.

        Raises:
            NotPublisherError: the client does not publish the model, or no longer does.
            ProtocolError: the model has no plan, unfilled segments, or another manifest than its plan.
            DigestMismatchError: a blob's bytes do not match, or the plan counted on a blob that was quarantined.
            MemoryBackendError: a segment is still mapped for writing.
        """
        state, key, client = self._state, request.key, session.client
        state.models.publishing(key, client.number)  # nothing is decoded for another client
        # Every tensor is checked: of very many, in a thread.
        decode = manifests.decode
        large = len(request.manifest) >= LARGE_MANIFEST
        manifest = await asyncio.to_thread(decode, request.manifest) if large else decode(request.manifest)
        plan = self._ready(session, request, manifest)
        await self._devices.seal(plan.segments)
        wrong = await asyncio.to_thread(self._devices.check(plan.written).wrong)
        state.models.publishing(key, client.number)  # the publication may have ended meanwhile
        if state.plans.get(key) is not plan:
            raise DigestMismatchError(f"blobs that {key} counts on were quarantined meanwhile; plan anew")
        if wrong:
            # Sealed bytes cannot be corrected. The client is still the publisher, and may plan anew.
            self._effects.carry_out(state.drop_plan(key))
            self._signals.changed()
            blob, found = wrong[0]
            raise DigestMismatchError(
                f"bytes published as {blob.digest.hex()[:16]} are {found.hex()[:16]}: not accepted"
            )
        returning = key in state.committed
        effects = state.commit(key, client.number, Committed(request.manifest, manifest))
        what = "returned" if returning else "published"
        log.info("%s %s: %d tensors, %d bytes", what, manifest.name, len(manifest.tensors), manifest.nbytes)
        if not returning:
            self._signals.event("published", key=key, name=manifest.name, bytes=manifest.nbytes, pid=client.pid)
        for segment in plan.returning:
            nbytes = state.segments.at(segment).nbytes
            self._signals.event("segment_returned", device=manifest.device, segment=segment, bytes=nbytes)
        self._effects.carry_out(effects)
        self._signals.changed()
        self._keeper.note(key)
        answer = self._attach.attached(session, key, request.id)
        await self._keeper.flushed()  # the reply must be true of the next store, too
        return answer

    def _ready(self, session: Session, request: messages.Commit, manifest: manifests.Manifest) -> PublishPlan:
        """Return the plan of a model that may be committed with this manifest. Raises as :meth:`commit` does."""
        state, key = self._state, request.key
        model = state.models.publishing(key, session.client.number)
        plan = state.plans.get(key)
        if plan is None:
            raise ProtocolError(f"{key} was not planned")
        if not state.segments.filled(plan):
            raise ProtocolError(f"{key} has segments that were never filled")
        if manifest.key != key or manifest.device != model.device or manifest.blobs != plan.blobs:
            raise ProtocolError(f"the manifest of {key} is not that of its plan")
        return plan

    async def abandon(self, session: Session, request: messages.Abandon) -> Answer:
        """End a publication without a commit; the next waiter that may publish does.

        Raises:
            NotPublisherError: the client does not publish the model.
        """
        client, key = session.client, request.key
        effects = self._state.abort(key, client.number)
        self._signals.event("publish_abandoned", key=key, reason=request.reason, pid=client.pid)
        self._effects.carry_out(effects)
        self._signals.changed()
        return Answer(messages.Done(request.id))


def _rest(plan: PublishPlan, index: dict[int, int]) -> tuple[messages.RestBlob, ...]:
    """Return the blobs of other models in returning segments. ``index``: of each segment in the reply."""
    return tuple(
        messages.RestBlob(index[segment], offset, blob.nbytes, blob.digest)
        for segment, blobs in plan.rest.items()
        for blob, offset in blobs
    )


def _preferred(request: messages.Plan) -> Layout | None:
    """Return the layout that the client prefers, if it names one."""
    if not request.wish:
        return None
    return Layout(request.sizes, tuple(Placement(place.segment, place.offset) for place in request.wish))
