"""Handlers of ``Join``, ``TakeRoom`` and ``ReportWorkload``: what workloads say about themselves, and ask for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from shared_store.base.errors import ExclusiveError, ProtocolError, WoolyError
from shared_store.base.text import one_line
from shared_store.base.workload_states import WorkloadState
from shared_store.protocol import messages
from shared_store.protocol.messages.identity import MAX_NAME
from shared_store.store.clients.exclusive import check_exclusive
from shared_store.store.residency.authority import Authority
from shared_store.store.residency.deep import Deep
from shared_store.store.residency.swapper import Swapper
from shared_store.store.session import Answer, Session
from shared_store.store.signals import Signals
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import AWAY, Report, Wait, Workload

log = logging.getLogger(__name__)

MAX_DEVICES: Final = 64
"""Devices that a workload may name."""

MAX_BYTES: Final = 1 << 50
"""Highest number of bytes in a message. What a workload has is also limited to its device's physical memory."""

MAX_STEPS: Final = 32
MAX_TEXT: Final = 300
"""Characters of a refusal; the rest is cut."""


@dataclass(frozen=True, eq=False)
class WorkloadRequests:
    """Workloads: they join, take memory, and report their states."""

    _state: StoreState
    _signals: Signals
    _authority: Authority
    _swapper: Swapper
    _session_of: Callable[[int], Session | None]
    _deep: Deep

    async def join(self, session: Session, request: messages.Join) -> Answer:
        """Add a workload; answer with its name and priority.

        Raises:
            ProtocolError: the message is malformed, or the id is not that of the client's identity.
            UnknownDeviceError: there is no such device on this node.
            ExclusiveError: it starts on a device that another workload has for itself, or would have one for itself
                that others use.
        """
        report = _report(request, refusal=request.refusal or _own_refusal(session))
        await self._open(report.private, report.needs)
        report = self._believed(report)
        if session.gone.is_set():
            return Answer(messages.Joined(request.id, "", 0))
        client = session.client
        self._replace_lost(request.workload)
        name = one_line(request.name or client.identity.name or client.name, MAX_NAME)
        devices = {*report.private, *report.needs}
        try:
            check_exclusive(self._state.workloads, request.workload, name, devices, exclusive=client.identity.exclusive)
        except ExclusiveError as error:
            if request.starting:
                raise
            log.warning("%s; it joins all the same, since it runs already", error)
        workload = self._state.workloads.join(client, request.workload, name, report, starting=request.starting)
        log.info("%s speaks for workload %s (P%d, %s)", client, workload.name, workload.priority, workload.state.value)
        self._signals.event(
            "workload_joined", name=workload.name, engine=workload.kind, priority=workload.priority, pid=client.pid
        )
        self._changed()
        return Answer(messages.Joined(request.id, workload.name, workload.priority))

    async def take_room(self, session: Session, request: messages.TakeRoom) -> Answer:
        """Answer once the workload may allocate.

        On a device whose memory this store does not grant, it may at once.

        Raises:
            WorkloadNotFoundError: the client does not speak for this workload.
            ProtocolError: the message is malformed, or the workload waits already.
            UnknownDeviceError: there is no such device on this node.
            RequestCancelledError: the client cancelled the request while it waited.
            ConnectionLostError: the client disconnected while it waited.
            DeclinedError: the driver does not bring its processes back to their GPU.
            ExclusiveError: as for :meth:`join`: a workload that runs joined a restarted store later than one that
                starts, or comes to use another device.
        """
        workload = self._state.workloads.by(session.client, request.workload)
        needs = _by_device(request.needs)
        await self._open(needs)
        session.pending.check()
        workload = self._state.workloads.by(session.client, request.workload)
        if self._state.workloads.waits_for_room(workload.id):
            raise ProtocolError(f"{workload.name} waits for memory already")
        self._check_alone(workload, needs)
        self._state.workloads.end_grant(workload)
        since = time.monotonic()
        wait = Wait(since, workload.priority, needs, workload.id, start=workload.starting)
        preempted = await self._swapper.take(session, wait)
        try:
            await self._deep.bring_back(workload, session)
            session.pending.check()  # what it reported after its cancel did not end the grant of one that was off
        except WoolyError:
            self._state.workloads.end_grant(workload)
            raise
        return Answer(messages.RoomTaken(request.id, time.monotonic() - since, preempted))

    def _check_alone(self, workload: Workload, needs: Mapping[str, int]) -> None:
        """Check devices of a start, and those that a workload comes to use. Raises :class:`ExclusiveError`."""
        own = set(workload.devices)
        devices = own | set(needs) if workload.starting else set(needs) - own
        if devices:
            number, name, exclusive = workload.id, workload.name, workload.exclusive
            check_exclusive(self._state.workloads, number, name, devices, exclusive=exclusive)

    async def report(self, session: Session, request: messages.ReportWorkload) -> Answer:
        """Record the state and memory of a workload.

        Raises:
            WorkloadNotFoundError: the client does not speak for this workload.
            ProtocolError: the message is malformed.
            UnknownDeviceError: there is no such device on this node.
        """
        report = _report(request, refusal=request.refusal or _own_refusal(session))
        self._state.workloads.by(session.client, request.workload)
        await self._open(report.private, report.needs)
        report = self._believed(report)
        workload = self._state.workloads.by(session.client, request.workload)
        before = self._state.workloads.report(workload, report)
        if before is not report.state:
            self._say(workload, before, report)
        self._changed()
        return Answer(messages.Done(request.id))

    def _replace_lost(self, number: str) -> None:
        """Drop a workload whose speaker is gone: it joins over another connection before the end of the old one."""
        before = self._state.workloads.get(number)
        speaker = None if before is None else self._session_of(before.client)
        if before is not None and (speaker is None or speaker.gone.is_set()):
            self._state.workloads.drop(before)

    async def _open(self, *memories: Mapping[str, int]) -> None:
        """Open the accounts of devices that are new."""
        accounts = self._state.accounts
        devices = {device for memory in memories for device in memory if not accounts.known(device)}
        if devices:
            await self._authority.open(sorted(devices))

    def _believed(self, report: Report) -> Report:
        """Limit what a workload says that it has on a device to the device's physical memory, where that is known."""
        physical = self._state.accounts.physical

        def limited(amounts: Mapping[str, int]) -> dict[str, int]:
            totals = {device: physical(device) for device in amounts}
            return {device: min(nbytes, totals[device] or MAX_BYTES) for device, nbytes in amounts.items()}

        return replace(report, private=limited(report.private), stays=limited(report.stays))

    def _say(self, workload: Workload, before: WorkloadState, report: Report) -> None:
        """Log a new state, and signal it where it is one that lasts."""
        log.info("workload %s: %s -> %s", workload.name, before.value, report.state.value)
        took_ms = round(1e3 * sum(report.steps.values()))
        if report.state is WorkloadState.SWAPPED and before is WorkloadState.RETURNING:
            self._signals.event("workload_rolled_back", name=workload.name)
        elif report.state in AWAY:
            self._signals.event("workload_swapped_out", name=workload.name, bytes=report.moved, took_ms=took_ms)
        elif report.state is WorkloadState.RESIDENT and before is WorkloadState.RETURNING:
            self._signals.event("workload_returned", name=workload.name, bytes=report.moved, took_ms=took_ms)

    def _changed(self) -> None:
        self._signals.changed()
        self._swapper.wake()


def _own_refusal(session: Session) -> str:
    """Return why a client's identity forbids swaps; empty: it does not."""
    return "" if session.client.identity.swap else "WOOLYAI_SWAP_FROM_VRAM=0"


def _report(request: messages.Join | messages.ReportWorkload, *, refusal: str) -> Report:
    """Return what a client reports. Raises :class:`ProtocolError` for values out of their ranges."""
    try:
        state = WorkloadState(request.state)
    except ValueError:
        raise ProtocolError(f"no state of workloads: {one_line(request.state, MAX_TEXT)}") from None
    steps: tuple[messages.StepTime, ...] = ()
    moved = 0
    if isinstance(request, messages.ReportWorkload):
        steps, moved = request.steps[:MAX_STEPS], request.moved
    return Report(
        state,
        _by_device(request.private),
        _by_device(request.stays),
        _by_device(request.needs),
        one_line(refusal, MAX_TEXT),
        min(max(0, moved), MAX_BYTES),
        {one_line(step.step, MAX_NAME): max(0.0, step.seconds) for step in steps if step.seconds < MAX_BYTES},
        request.deep,
    )


def _by_device(amounts: Iterable[messages.DeviceBytes]) -> dict[str, int]:
    """Return bytes by device. Raises :class:`ProtocolError` for negative or too many ones."""
    found = {amount.device: amount.nbytes for amount in amounts}
    if len(found) > MAX_DEVICES or any(not 0 <= nbytes <= MAX_BYTES for nbytes in found.values()):
        raise ProtocolError(f"bytes of a workload on at most {MAX_DEVICES} devices, of 0 to {MAX_BYTES}")
    return found
