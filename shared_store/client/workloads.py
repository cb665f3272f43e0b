"""Requests about workloads: for the client that speaks for one, and for people who look at or move them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from shared_store.base.errors import UnsupportedError
from shared_store.client.connection import Connection
from shared_store.client.joining import Joining, join
from shared_store.client.link import CALL_TIMEOUT_S
from shared_store.client.withdrawal import Withdrawal
from shared_store.protocol import messages

MOVE_TIMEOUT_S: Final = 600.0
"""Seconds for a workload that is moved by name."""


class Workloads:
    """The requests of one session. All raise :class:`UnsupportedError` for a store that does not list workloads."""

    def __init__(self, connection: Connection) -> None:
        """Use a connection."""
        self._connection = connection

    # For the client that speaks for a workload.

    def join(self, joining: Joining) -> None:
        """Join the store, and each later store, too. The answer goes to ``joining``, also if there is no such list.

        Raises:
            StoreUnavailableError: the connection ended. The next store is joined nevertheless.
        """
        self._connection.joining = joining
        join(self._connection.link, self._connection.next_id(), joining)

    def take_room(
        self, workload: str, needs: Mapping[str, int], timeout_s: float, withdrawal: Withdrawal | None = None
    ) -> messages.RoomTaken:
        """Wait until a workload may allocate, on all devices at once and in full.

        Args:
            workload: its id.
            needs: private bytes on each device.
            timeout_s: seconds to wait.
            withdrawal: ends the wait before.

        Raises:
            TimedOutError: there was no memory in time.
            RequestCancelledError: it was withdrawn.
            OutOfMemoryError: there will never be so much.
            StoreUnavailableError: no store answers. The next one must be asked again.
        """
        self._check()
        request = messages.TakeRoom(self._connection.next_id(), workload, device_bytes(needs))
        reply, fds = self._connection.call(request, messages.RoomTaken, timeout_s, repeat=False, withdrawal=withdrawal)
        fds.close()
        return reply

    def report(self, report: messages.ReportWorkload) -> None:
        """Report a workload's state and memory. Not repeated to another store, which it joins with its state.

        Args:
            report: with any id.
        """
        self._check()
        self._done(msgspec.structs.replace(report, id=self._connection.next_id()))

    # For people.

    def move(self, name: str, *, out: bool, wait: bool = True, timeout_s: float = MOVE_TIMEOUT_S) -> str:
        """Swap a workload out or in, by its name. Returns the store's detail.

        Args:
            name: of the workload.
            out: out, or in.
            wait: until it is where it should be.
            timeout_s: seconds to wait.

        Raises:
            DeclinedError: it cannot leave; the message has the reason.
        """
        self._check()
        return self._done(messages.MoveWorkload(self._connection.next_id(), name, out, wait), timeout_s)

    def set_priority(self, name: str, priority: int) -> str:
        """Set a workload's priority, 0 (highest) to 4, by its name. Returns the store's detail."""
        self._check()
        return self._done(messages.SetPriority(self._connection.next_id(), name, priority))

    def explain(self, name: str, timeout_s: float = CALL_TIMEOUT_S) -> messages.Explanation:
        """Ask why a workload is where it is, by its name."""
        self._check()
        request = messages.ExplainWorkload(self._connection.next_id(), name)
        reply, fds = self._connection.call(request, messages.Explanation, timeout_s, repeat=True)
        fds.close()
        return reply

    def _check(self) -> None:
        link = self._connection.link
        if messages.WORKLOADS not in link.capabilities:
            raise UnsupportedError(
                f"the store has version {link.welcome.version}, which lists no workloads; `wooly upgrade` replaces it"
            )

    def _done(self, request: messages.Request, timeout_s: float = CALL_TIMEOUT_S) -> str:
        reply, fds = self._connection.call(request, messages.Done, timeout_s, repeat=False)
        fds.close()
        return reply.detail


def device_bytes(amounts: Mapping[str, int]) -> tuple[messages.DeviceBytes, ...]:
    """Return bytes by device as a message has them."""
    return tuple(messages.DeviceBytes(device, nbytes) for device, nbytes in sorted(amounts.items()))
