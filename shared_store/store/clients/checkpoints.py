"""Handler of ``OfferCheckpoints``: helpers that take workloads off their GPU."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.base.errors import WorkloadNotFoundError
from shared_store.base.text import one_line
from shared_store.base.workload_states import WorkloadState
from shared_store.protocol import messages
from shared_store.store.residency.deep import MAX_REASON, Deep, Helper
from shared_store.store.residency.swapper import Swapper
from shared_store.store.session import Answer, Session
from shared_store.store.state.store_state import StoreState


@dataclass(frozen=True, eq=False)
class CheckpointRequests:
    """Helpers of workloads."""

    _state: StoreState
    _deep: Deep
    _swapper: Swapper

    async def offer(self, session: Session, request: messages.OfferCheckpoints) -> Answer:
        """Use a client as the helper of a workload of the same user.

        Raises:
            WorkloadNotFoundError: no workload of this user has this id. It may not have joined yet.
        """
        workload = self._state.workloads.get(request.workload)
        if workload is None or workload.uid != session.client.uid:
            raise WorkloadNotFoundError("no workload with this id has joined")
        helper = Helper(session.client.number, one_line(request.refusal, MAX_REASON))
        resident = workload.state is WorkloadState.RESIDENT  # a late offer: it was brought back meanwhile
        self._deep.offer(workload, helper, off=request.off and not resident)
        self._swapper.wake()
        return Answer(messages.Done(request.id))
