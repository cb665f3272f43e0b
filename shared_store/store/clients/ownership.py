"""Commands about a workload: which clients may give them, and how its own client hears of what is set."""

from __future__ import annotations

from collections.abc import Callable

from shared_store.protocol import messages
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


def tell_settings(workload: Workload, session_of: Callable[[int], Session | None]) -> None:
    """Tell the client of a workload its priority and share, so that it joins the next store with them."""
    session = session_of(workload.client)
    if session is not None:
        session.push(messages.SETTINGS, f"{workload.priority} {workload.share:g}")
