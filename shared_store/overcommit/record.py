"""Where a workload's memory is, as its agent knows it, and what the store hears of that.

Every change is made with :attr:`Record.changed` held, and wakes all that wait for it. A report leaves in the same
moment, so that the store hears changes in their order.

While memory is waited for, reports are *held*: one that said ``swapped`` would end the grant that may be on its way.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from shared_store.base.workload_states import TRANSITIONS, WorkloadEvent, WorkloadState
from shared_store.client.workloads import device_bytes
from shared_store.overcommit.mover import Holdings
from shared_store.protocol import messages

AWAY: Final = frozenset({WorkloadState.SWAPPED, WorkloadState.CHECKPOINTED})
"""States of a workload that is not on its devices, and does not move."""

_TO_RESIDENT: Final = (WorkloadEvent.RETURN, WorkloadEvent.BACK)
_TO_SWAPPED: Final = (WorkloadEvent.DRAIN, WorkloadEvent.LEAVE, WorkloadEvent.AWAY)


class Record:
    """One workload. Read and changed with :attr:`changed` held; :attr:`state` alone may be read without it.

    Attributes:
        changed: the lock, and the condition that is notified of every change.
        workload: its id.
        name: unique in the store once it has joined.
        priority: as the store admits it.
        state: where its memory is.
        starting: it was never resident.
        asleep: it left by itself, and stays away until it is woken up.
        growing: it is resident, and waits for more memory or allocates it.
        refusal: why it must not be swapped out; empty if it may be.
        deep: its processes may be taken off their GPU while it is swapped.
        devices: the store's names of its devices.
        holdings: bytes that it has.
        listed: whether a store lists it; None before the first answer.
        joins: how often a store answered.
        report: sends a report; set once there is a session.
    """

    def __init__(self, name: str, devices: Sequence[str], refusal: str) -> None:
        """Begin without memory, before the start."""
        self.changed = threading.Condition()
        self.workload = uuid.uuid4().hex
        self.name = name
        self.priority = 0
        self.state = WorkloadState.SWAPPED
        self.starting = True
        self.asleep = False
        self.growing = False
        self.refusal = refusal
        self.deep = False
        self.holdings = Holdings(private=dict.fromkeys(devices, 0))
        self.listed: bool | None = None
        self.joins = 0
        self.report: Callable[[messages.ReportWorkload], None] = lambda _: None
        self.devices = tuple(devices)
        self._held = False
        self._said: messages.Join | None = None

    def apply(self, event: WorkloadEvent, holdings: Holdings | None = None) -> None:
        """Change the state, and report it.

        Args:
            event: allowed in this state.
            holdings: the bytes from here on; None: unchanged.
        """
        self.state = TRANSITIONS[self.state, event]
        self._settle(holdings)

    def become(self, state: WorkloadState, holdings: Holdings | None = None, *, known: bool = True) -> None:
        """Be resident or swapped without a move of the agent, through the transitions between, and report them.

        Args:
            state: resident or swapped.
            holdings: the bytes from here on; None: unchanged.
            known: whether the bytes are known. If not, reports are held from the last transition on.
        """
        events = _TO_RESIDENT if state is WorkloadState.RESIDENT else (WorkloadEvent.ROLL_BACK, *_TO_SWAPPED)
        for event in events:
            after = TRANSITIONS.get((self.state, event))
            if after is not None and self.state is not state:
                self.state = after
                if after is not state:
                    self.say()
        if known:
            self._settle(holdings)
        else:
            self.hold()
            self.changed.notify_all()

    def expect(self, needs: Mapping[str, int]) -> None:
        """Expect a start to allocate bytes on each device: another store than the one that grants them counts them."""
        private = self.holdings.private
        total = {device: private.get(device, 0) + nbytes for device, nbytes in needs.items()}
        self.holdings = replace(self.holdings, needs=total)

    def missing(self) -> Mapping[str, int]:
        """Return the private bytes that a return allocates on each device."""
        private, needs = self.holdings.private, self.holdings.needs
        return {device: max(0, needs.get(device, 0) - private.get(device, 0)) for device in self.devices}

    def whole(self) -> Mapping[str, int]:
        """Return the bytes that a return without a store may allocate: :meth:`missing`, and all shared weights."""
        shared = self.holdings.shared
        return {device: nbytes + shared.get(device, 0) for device, nbytes in self.missing().items()}

    def say(self) -> None:
        """Report the state and the bytes, unless reports are held."""
        if not self._held:
            self.report(self._report())
        self.changed.notify_all()

    def hold(self) -> None:
        """Hold reports: memory is waited for."""
        self._held = True

    def release(self) -> None:
        """Hold reports no longer, and report: without a change of the state this ends a grant."""
        self._held = False
        self.say()

    # For the session, without the lock.

    def request(self, number: int) -> messages.Join:
        """Return the present state as a request to join."""
        with self.changed:
            private, stays, needs = self._bytes()
            name = self.name if self.listed is not None else ""  # the one of the store before
            self._said = messages.Join(
                number,
                self.workload,
                self.state.value,
                private,
                stays,
                needs,
                self.refusal,
                self.starting,
                name,
                self.may_be_off(),
            )
            return self._said

    def joined(self, answer: messages.Joined | None) -> None:
        """Hear the answer. A change since :meth:`request` is reported again."""
        with self.changed:
            self.listed = answer is not None
            self.joins += 1
            if answer is None:
                if self.starting:  # there is nothing to wait for
                    self.state = WorkloadState.RESIDENT
            else:
                self.name, self.priority = answer.name, answer.priority
                said = self._said
                if said is not None and (said.state, said.private) != (self.state.value, self._bytes()[0]):
                    self.say()
            self.changed.notify_all()

    def _settle(self, holdings: Holdings | None) -> None:
        if holdings is not None:
            self.holdings = holdings
        self._held = False
        self.say()
        self.holdings = replace(self.holdings, moved=0, steps={})  # reported once

    def _bytes(self) -> tuple[tuple[messages.DeviceBytes, ...], ...]:
        """Return private bytes, those that stay, and those that it needs. All devices are listed in the first."""
        found = self.holdings
        private = {**dict.fromkeys(self.devices, 0), **found.private}
        return device_bytes(private), device_bytes(found.stays), device_bytes(found.needs)

    def _report(self) -> messages.ReportWorkload:
        private, stays, needs = self._bytes()
        steps = tuple(messages.StepTime(step, seconds) for step, seconds in self.holdings.steps.items())
        return messages.ReportWorkload(
            0,
            self.workload,
            self.state.value,
            private,
            stays,
            needs,
            self.refusal,
            self.holdings.moved,
            steps,
            self.may_be_off(),
        )

    def may_be_off(self) -> bool:
        """Return whether nothing but a return calls CUDA now: of a sleeping engine, its user may."""
        return self.deep and not self.asleep and self.state is WorkloadState.SWAPPED
