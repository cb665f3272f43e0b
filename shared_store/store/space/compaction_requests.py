"""Handlers of ``Compact`` and ``Compacted``: a client copies blobs to a new segment."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.base.errors import ProtocolError
from shared_store.protocol import messages
from shared_store.store.devices.devices import Devices
from shared_store.store.session import Answer, Session, cancelled
from shared_store.store.space.compaction import Compactor
from shared_store.store.state.compactions import Compaction
from shared_store.store.state.store_state import StoreState


@dataclass(frozen=True, eq=False)
class CompactionRequests:
    """Compactions by clients."""

    _state: StoreState
    _devices: Devices
    _compactor: Compactor

    async def compact(self, session: Session, request: messages.Compact) -> Answer:
        """Answer with blobs to copy, and descriptors of the new segment and of the old ones; `Done`: nothing to gain.

        Raises as :meth:`Compactor.begin` does, and :class:`RequestCancelledError`: the client cancelled the request.
        """
        compaction = await self._compactor.begin(request.device, session)
        if compaction is None:
            return Answer(messages.Done(request.id))
        if session.pending.cancelled:
            self._compactor.cancel(compaction)
            raise cancelled()
        plan = compaction.plan
        segments = (compaction.segment, *plan.sources)
        try:
            fds = self._devices.export_all(segments)
        except BaseException:
            self._compactor.cancel(compaction)
            raise
        index = {segment: number for number, segment in enumerate(plan.sources)}
        moves = tuple(
            messages.Move(index[move.source], move.start, move.offset, move.blob.nbytes, move.blob.digest)
            for move in plan.moves
        )
        target, *sources = (
            messages.SegmentInfo(segment, self._state.segments.at(segment).nbytes) for segment in segments
        )
        return Answer(messages.Compacting(request.id, target, tuple(sources), moves), fds)

    async def compacted(self, session: Session, request: messages.Compacted) -> Answer:
        """Verify a client's copies, and move the blobs to them.

        Raises:
            ProtocolError: the client has no compaction into this segment.
        """
        moved, freed = await self._compactor.end(self._of(session, request.segment))
        return Answer(messages.Switched(request.id, moved, freed))

    async def abandon(self, session: Session, request: messages.AbandonCompaction) -> Answer:
        """End a client's compaction without a change.

        Raises:
            ProtocolError: the client has no compaction into this segment.
        """
        self._compactor.cancel(self._of(session, request.segment))
        return Answer(messages.Done(request.id))

    def _of(self, session: Session, segment: int) -> Compaction:
        compaction = self._state.compactions.into(segment)
        if compaction is None or compaction.client != session.client.number:
            raise ProtocolError(f"client {session.client.number} compacts nothing into segment {segment}")
        return compaction
