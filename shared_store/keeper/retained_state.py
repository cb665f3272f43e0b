"""The state that a keeper retains, and its copies: the journal, and fds stored with the service manager."""

from __future__ import annotations

import logging
import socket

from shared_store.keeper import journal
from shared_store.keeper.journal import Journal
from shared_store.keeper.service_manager import ServiceManager, stored_fds
from shared_store.protocol import keeper_messages
from shared_store.protocol.durable_state import DurableState
from shared_store.runtime.fds import OwnedFds
from shared_store.runtime.paths import RuntimePaths

log = logging.getLogger(__name__)

LISTEN = "listen"
SEGMENT = "segment-"
"""Names of stored fds: the listening socket, and each segment, with its id appended."""


class RetainedState:
    """A :class:`DurableState`, written to the journal and to the service manager as it changes."""

    def __init__(self, state: DurableState, paths: RuntimePaths, manager: ServiceManager) -> None:
        """Take over the state."""
        self.state = state
        self._manager = manager
        self._journal = Journal(paths.journal)

    @property
    def journal_reason(self) -> str:
        """Why the journal is incomplete; empty: it is complete."""
        return self._journal.reason

    def rewrite(self) -> None:
        """Write the whole state to the journal."""
        self._journal.rewrite(change for change, _ in self.state.changes())

    def rewrite_if_due(self) -> None:
        """Rewrite a journal that is mostly history, or retry after a failed write."""
        if self._journal.due():
            self.rewrite()

    def apply(self, change: keeper_messages.StateChange, fds: OwnedFds) -> None:
        """Apply a change to the state and its copies, and take over its fds."""
        with_fd = len(fds) > 0
        self.state.apply(change, fds)
        self._journal.append(change)
        if isinstance(change, keeper_messages.Hold) and with_fd:
            segment = self.state.segments[change.segment.id]
            if segment.fd is not None:
                self._manager.store_fd(f"{SEGMENT}{segment.record.id}", segment.fd.fileno())
        elif isinstance(change, keeper_messages.Release | keeper_messages.Vacate):
            self._manager.remove_fd(f"{SEGMENT}{change.segment}")

    def discard(self) -> None:
        """Delete the journal and the stored fds: the next start shall begin with nothing."""
        for name in (LISTEN, *(f"{SEGMENT}{number}" for number in self.state.segments)):
            self._manager.remove_fd(name)
        self._manager.wait()
        self._journal.remove()

    def close(self) -> None:
        """Close the fds. The journal remains on disk."""
        self.state.close()
        self._journal.close()
        self._manager.close()


def recover(
    paths: RuntimePaths, manager: ServiceManager
) -> tuple[DurableState, socket.socket | None, list[tuple[str, str]]]:
    """Rebuild the state of an earlier keeper from the journal and from stored fds.

    Returns:
        The state, the listening socket if it was stored, and events (kind, detail) for what could not be used.
    """
    changes, damage = journal.read(paths.journal)
    events = [("journal_damaged", f"{paths.journal}: {damage}")] if damage else []
    state = DurableState()
    for change in changes:
        state.apply(change)
    listening = None
    for name, fd in stored_fds():
        number = name.removeprefix(SEGMENT)
        if name == LISTEN and paths.socket.exists():
            listening = socket.socket(fileno=fd.detach())
        elif name.startswith(SEGMENT) and number.isdigit() and (segment := state.segments.get(int(number))):
            segment.fd = fd
        else:
            fd.close()
            manager.remove_fd(name)
            if name != LISTEN:
                events.append(("segment_dropped", f"the journal has no record of {name} from the service manager"))
    return state, listening, events
