"""Requests about workloads: for the client that speaks for one, and for people who look at or move them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import msgspec

from shared_store.base.errors import (
    ExclusiveError,
    StoreUnavailableError,
    UnsupportedError,
    WoolyError,
)
from shared_store.client.compute import ComputeMembership
from shared_store.client.connection import Connection
from shared_store.client.link import CALL_TIMEOUT_S, Link
from shared_store.client.withdrawal import Withdrawal
from shared_store.compute.gate import ComputeGate
from shared_store.protocol import messages

log = logging.getLogger(__name__)

MOVE_TIMEOUT_S: Final = 600.0
"""Seconds for a workload that is moved by name."""


class Declared(Protocol):
    """A workload as the client that speaks for it declares it. Called in any thread."""

    def request(self, number: int) -> messages.Join:
        """Return the present state as a request with an id."""

    def joined(self, answer: messages.Joined | None) -> None:
        """Hear the store's answer; None: this store does not list the workload.

        What was reported since :meth:`request` is lost. From here on :meth:`Workloads.report` reports to this store.
        """


class Workloads:
    """The requests of one session."""

    def __init__(self, connection: Connection) -> None:
        """Use a connection."""
        self._connection = connection
        self._declared: Declared | None = None
        self._joined: Link | None = None
        self._workload = ""
        self._compute: ComputeMembership | None = None

    # For the client that speaks for a workload.

    def join(self, declared: Declared) -> None:
        """Join the store, and each later store, too. The answer goes to ``declared``.

        A store that does not list workloads, or refuses, is no error: ``declared`` hears it, and the log.

        Raises:
            ConnectionLostError: the connection ended before.
            ExclusiveError: another workload has a device of this one for itself, or this one would have one for itself
                that others use. Nothing is joined.
        """
        self._declared = declared
        self._connection.joining = self._join
        self._connection.handlers.hear(messages.SETTINGS, self._hear_settings)
        try:
            self._join(self._connection.link, first=True)
        except ExclusiveError:
            self._connection.joining = self._declared = None
            raise

    def take_room(
        self, workload: str, needs: Mapping[str, int], timeout_s: float, withdrawal: Withdrawal | None = None
    ) -> messages.RoomTaken:
        """Wait until a workload may allocate, on all devices at once and in full.

        Args:
            workload: its id.
            needs: private bytes on each device.
            timeout_s: seconds to wait.
            withdrawal: ends the wait before.

        A grant may cross a wait that ends early: the next :meth:`report` ends it.

        Raises:
            TimedOutError: there was no memory in time.
            RequestCancelledError: it was withdrawn.
            OutOfMemoryError: there will never be so much.
            StoreUnavailableError: no store that lists the workload is connected. The next one must be asked again.
        """
        link = self._joined
        if link is None:
            raise StoreUnavailableError("no store that lists this workload is connected")
        request = messages.TakeRoom(self._connection.next_id(), workload, device_bytes(needs))
        reply, fds = link.call(request, messages.RoomTaken, timeout_s, withdrawal=withdrawal)
        fds.close()
        return reply

    def report(self, report: messages.ReportWorkload) -> None:
        """Report a workload's state and memory. Does not block, and does not wait for the answer.

        Reports arrive in order, before the next request or answer of this client. Without a store nothing happens: the
        next one is joined with the state that the workload has then.

        Args:
            report: with any id.
        """
        link = self._joined
        if link is not None:
            link.post(msgspec.structs.replace(report, id=self._connection.next_id()))

    def _join(self, link: Link, *, first: bool = False) -> None:
        """Join the store of a new link. ``first``: raise :class:`ExclusiveError`."""
        declared = self._declared
        if declared is None:
            return
        answer = None
        if messages.WORKLOADS not in link.capabilities:
            log.info("wooly: the store (version %s) does not list workloads", link.welcome.version)
        else:
            request = declared.request(self._connection.next_id())
            self._workload = request.workload
            try:
                answer, fds = link.call(request, messages.Joined)
            except WoolyError as error:
                if not link.alive or (first and isinstance(error, ExclusiveError)):
                    raise
                log.warning("wooly: the store does not list this workload: %s [%s]", error, error.code)
            else:
                fds.close()
        self._joined = None if answer is None else link
        declared.joined(answer)
        if self._compute is not None and self._joined is not None:
            self._compute.join(link)

    def _hear_settings(self, detail: str) -> None:
        """Hear that priority or share were set: the next store is joined with them."""
        identity = self._connection.identity
        try:
            priority, share = detail.split()
            if identity is not None:
                described = msgspec.structs.replace(identity, priority=int(priority), share=float(share))
                self._connection.identity = described.cleaned()
        except ValueError:
            log.warning("wooly: the store set a priority or share that this version does not know: %s", detail)

    def join_compute(self, gate: ComputeGate, ungated: str = "") -> None:
        """Have a gate obey the store's arbiter, and that of each later store, too. Call it after :meth:`join`.

        It does not raise: without a store, or with one that has no arbiter, steps are free.

        Args:
            gate: of the workload.
            ungated: why the workload must never be held; empty: it may be. It counts for the others all the same.
        """
        compute = ComputeMembership(gate, self._workload, ungated, self._connection.next_id, lambda: self._joined)
        before, self._compute = self._compute, compute  # first: a store that is joined meanwhile is not missed
        if before is not None:
            before.give_up()
        link = self._joined
        if link is not None:
            try:
                compute.join(link)
            except WoolyError as error:
                log.debug("wooly: the arbiter of the next store is joined: %s", error)

    def leave_compute(self) -> None:
        """Leave the arbiter, and close the gate. Idempotent."""
        if self._compute is not None:
            self._compute.close()

    # For the helper of a workload.

    def offer_checkpoints(self, offer: Callable[[int], messages.OfferCheckpoints], wanted: Callable[[], None]) -> None:
        """Offer to checkpoint a workload. Call it again when it is wanted: the store was replaced.

        Args:
            offer: returns the offer with an id.
            wanted: called when another store was connected. It must not make requests.

        Raises:
            WorkloadNotFoundError: the workload has not joined, or not again yet.
            UnsupportedError: the store does not know checkpoints.
        """
        self._connection.joining = lambda _link: wanted()
        link = self._connection.link
        if messages.CHECKPOINTS not in link.capabilities:
            raise UnsupportedError(f"the store has version {link.welcome.version}, which knows no checkpoints")
        self._connection.call(offer(self._connection.next_id()), messages.Done, repeat=False)[1].close()

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
            UnsupportedError: the store does not list workloads.
        """
        return self._done(messages.MoveWorkload(self._connection.next_id(), name, out, wait), timeout_s)

    def set_priority(self, name: str, priority: int) -> str:
        """Set a workload's priority, 0 (highest) to 4, by its name. Returns the store's detail. Raises as above."""
        return self._done(messages.SetPriority(self._connection.next_id(), name, priority))

    def set_share(self, name: str, percent: float) -> str:
        """Set a workload's share of its devices' time among equals, by its name. Returns the store's detail.

        Args:
            name: of the workload.
            percent: 1 to 100; 0: an equal part of what the others leave.

        Raises:
            ConfigError: there is no such share.
            WorkloadNotFoundError: no workload has this name.
            PermissionDeniedError: it is another user's.
            UnsupportedError: the store has no arbiter.
        """
        link = self._connection.link
        if messages.COMPUTE not in link.capabilities:
            raise UnsupportedError(
                f"the store (version {link.welcome.version}) has no arbiter, so there are no shares: it was started "
                "with `--no-arbiter` or WOOLY_ARBITER=0, or has an earlier version, which `wooly upgrade` replaces"
            )
        return self._done(messages.SetShare(self._connection.next_id(), name, percent))

    def explain(self, name: str, timeout_s: float = CALL_TIMEOUT_S) -> messages.Explanation:
        """Ask why a workload is where it is, by its name. Raises as above."""
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
        self._check()
        reply, fds = self._connection.call(request, messages.Done, timeout_s, repeat=False)
        fds.close()
        return reply.detail


def device_bytes(amounts: Mapping[str, int]) -> tuple[messages.DeviceBytes, ...]:
    """Return bytes by device as a message has them."""
    return tuple(messages.DeviceBytes(device, nbytes) for device, nbytes in sorted(amounts.items()))
