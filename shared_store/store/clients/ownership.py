"""Which clients may command a workload: those of its own user, and administrators."""

from __future__ import annotations

from shared_store.store.session import Session
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import Workload


def own_workload(state: StoreState, session: Session, name: str, action: str) -> Workload:
    """Return the workload with a name. ``action``: after "may not".

    Raises:
        WorkloadNotFoundError: no workload has this name.
        PermissionDeniedError: it is another user's, and the client is no administrator.
    """
    workload = state.workloads.named(name)
    if workload.uid != session.client.uid:
        session.require_admin(f"{action} {workload.name}, a workload of uid {workload.uid}")
    return workload
