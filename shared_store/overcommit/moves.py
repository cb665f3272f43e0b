"""The thread of an agent: leaves the devices when the store asks, and returns when there is work."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from shared_store.base.errors import (
    DeclinedError,
    RequestCancelledError,
    StoreUnavailableError,
    WoolyError,
)
from shared_store.base.workload_states import WorkloadEvent, WorkloadState
from shared_store.client.withdrawal import Withdrawal
from shared_store.overcommit import alone
from shared_store.overcommit.mover import Holdings, Mover
from shared_store.overcommit.record import AWAY, Record
from shared_store.overcommit.room import Room
from shared_store.runtime.backoff import delays

log = logging.getLogger(__name__)

ALONE_EVERY_S = 1.0
"""Seconds between two attempts to return without a store."""


@dataclass(eq=False)
class Leaving:
    """A request of the store to leave.

    Attributes:
        reason: for people.
        active: also with requests running or waiting.
        within_s: seconds until it must be declined or begun; 0: no limit.
        ended: whether it is answered.
        declined: why the workload goes on instead.
    """

    reason: str
    active: bool
    within_s: float
    ended: bool = False
    declined: str = ""
    since: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        """Return the seconds that are left, above 0; 0: no limit."""
        return 0.0 if self.within_s == 0 else max(0.001, self.within_s - (time.monotonic() - self.since))

    def end(self, declined: str = "") -> None:
        """Be answered."""
        self.ended, self.declined = True, declined


@dataclass(eq=False)
class Preparing:
    """A request of the store to prepare for a checkpoint.

    Attributes:
        ended: whether it is answered.
        declined: why there must be no checkpoint.
    """

    ended: bool = False
    declined: str = ""


class Wait(Protocol):
    """Waits until a workload is resident."""

    def __call__(self, timeout_s: float | None, cancelled: threading.Event | None = None, /) -> bool:
        """Wait. See :meth:`Moves.waiting`."""


def _nothing() -> None:
    """Bring nothing back: this process is never taken off its GPU."""


class Moves:
    """The moves of one workload. Methods may be called from any thread."""

    def __init__(self, record: Record, mover: Mover, room: Room) -> None:
        """Prepare the thread. :meth:`start` starts it."""
        self._record = record
        self._mover = mover
        self._room = room
        self.moving = False
        """Whether the mover moves the workload now. Read and changed with the record's lock."""
        self.bring_back: Callable[[], None] = _nothing
        """Brings this process back to its GPU, if the driver has it off. Set by the agent. May raise `WoolyError`."""
        self._leavings: list[Leaving] = []
        self._preparing: list[Preparing] = []
        self._prepared = False
        self._wants = False
        self._waiting = 0
        self._refresh = False
        self._closing = False
        self._withdrawal: Withdrawal | None = None
        self._retry_at = 0.0
        self._joins = 0
        self._delays = delays()
        self._said = ""
        self._thread = threading.Thread(target=self._run, name="wooly-agent", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the move that is under way, but do not wait: it may need the caller's thread."""
        with self._record.changed:
            self._closing = True
            for leaving in self._leavings:
                leaving.end("it ends")
            self._leavings.clear()
            self._end_preparing("it ends")
            self._withdraw()
            self._record.changed.notify_all()

    # Asked by the engine and the store.

    def wanted(self) -> None:
        """Return as soon as possible."""
        with self._record.changed:
            if self._record.state is not WorkloadState.RESIDENT and not self._record.asleep:
                self._wants = True
                self._record.changed.notify_all()

    def unwanted(self) -> None:
        """Return no more, unless a caller waits for it."""
        with self._record.changed:
            self._wants = False
            if not self._needed():
                self._withdraw()

    def refresh(self) -> None:
        """Ask the mover for its bytes, and report them. With the record's lock."""
        self._refresh = True
        self._record.changed.notify_all()

    def leave(self, leaving: Leaving) -> Leaving:
        """Leave the devices. With the record's lock.

        Returns:
            The request that is carried out: an earlier one, if it is leaving already.
        """
        if self._leavings:
            return self._leavings[0]
        self._leavings.append(leaving)
        self._record.changed.notify_all()
        return leaving

    def withdraw(self, leaving: Leaving) -> None:
        """Do not leave, if that has not begun. With the record's lock."""
        if not self.moving and leaving in self._leavings:
            self._leavings.remove(leaving)

    def prepare(self, preparing: Preparing) -> None:
        """Prepare for a checkpoint. With the record's lock."""
        self._preparing.append(preparing)
        self._record.changed.notify_all()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Wait]:
        """Need the workload on its devices for the block, which waits by calling what this yields."""
        with self._record.changed:
            self._waiting += 1
            self._record.changed.notify_all()
        try:
            yield self._wait_until_resident
        finally:
            with self._record.changed:
                self._waiting -= 1
                if not self._needed():
                    self._withdraw()

    def _wait_until_resident(self, timeout_s: float | None, cancelled: threading.Event | None = None) -> bool:
        """Wait until the workload is resident; return False after the time, or if the wait was cancelled.

        Args:
            timeout_s: seconds to wait; None: without a limit.
            cancelled: ends the wait; its setter notifies the record.

        Raises:
            DeclinedError: it left by itself, starts, or ends.
        """
        record = self._record
        with record.changed:
            record.changed.wait_for(
                lambda: self._settled() or (cancelled is not None and cancelled.is_set()), timeout_s
            )
            if record.state is not WorkloadState.RESIDENT and (reason := self._away_for()):
                raise DeclinedError(reason)
            return record.state is WorkloadState.RESIDENT

    def _settled(self) -> bool:
        return self._record.state is WorkloadState.RESIDENT or bool(self._away_for())

    def _away_for(self) -> str:
        """Return why it will not return, if it is away; empty if it will."""
        if self._closing:
            return "it ends"
        if self._record.asleep:
            return "its user put it to sleep, and has to wake it up"
        return "it is starting" if self._record.starting else ""

    def _needed(self) -> bool:
        return (self._wants or self._waiting > 0) and not self._away_for()

    def _withdraw(self) -> None:
        """End a wait for memory to return."""
        if self._withdrawal is not None:
            self._withdrawal.withdraw()
        self._record.changed.notify_all()

    # The thread.

    def _run(self) -> None:
        record = self._record
        while True:
            with record.changed:
                while not self._due():
                    record.changed.wait(self._retry_at - time.monotonic() if self._to_return() else None)
                if self._closing:
                    return
                refresh, self._refresh = self._refresh, False
                leaving = self._leavings[0] if self._leavings and not refresh else None
                prepare = bool(self._preparing) and leaving is None and not refresh
            if refresh:
                self._ask_for_bytes()
            elif prepare:
                self._prepare()
            elif leaving is not None:
                self._leave(leaving)
            else:
                self._return()

    def _due(self) -> bool:
        """Return whether there is something to do now."""
        if self._closing or self._refresh or self._leavings or self._preparing:
            return True
        joined = self._joins != self._record.joins  # another store answers: there is no reason to wait any more
        return self._to_return() and (joined or time.monotonic() >= self._retry_at)

    def _to_return(self) -> bool:
        return self._record.state in AWAY and self._needed()

    def _prepare(self) -> None:
        """Prepare for a checkpoint, unless the workload is needed or not away."""
        record = self._record
        with record.changed:
            declined = "" if record.may_be_off() and not self._needed() else f"it is {record.state.value}, or returns"
        if not declined:
            try:
                self._mover.prepare_checkpoint()
            except WoolyError as error:
                declined = f"{error} [{error.code}]"
            except Exception as error:
                log.exception("wooly: %s could not prepare for a checkpoint", record.name)
                declined = f"{type(error).__name__}: {error}"
        with record.changed:
            self._prepared = self._prepared or not declined
            self._end_preparing(declined)

    def _end_preparing(self, declined: str) -> None:
        for preparing in self._preparing:
            preparing.ended, preparing.declined = True, declined
        self._preparing.clear()
        self._record.changed.notify_all()

    def _ask_for_bytes(self) -> None:
        holdings = self._bytes()
        with self._record.changed:
            self._record.holdings = holdings
            self._record.release()

    def _bytes(self) -> Holdings:
        """Return what the mover has now, or had when it was asked last."""
        if self._prepared:  # the driver may have it off the GPU: a call would block
            return self._record.holdings
        try:
            return self._mover.holdings()
        except Exception:
            log.exception("wooly: the bytes of %s are not known", self._record.name)
            return self._record.holdings

    def _leave(self, leaving: Leaving) -> None:
        record = self._record
        with record.changed:
            declined = self._declines(leaving)
            if declined:
                self._ended(leaving, declined)
                return
            self.moving = True
            record.apply(WorkloadEvent.DRAIN)
        holdings = None
        try:
            holdings = self._mover.leave(active=leaving.active, within_s=leaving.left_s(), reached=self._reached)
        except DeclinedError as error:
            declined = str(error)
        except Exception as error:
            log.exception("wooly: %s could not leave its devices", record.name)
            declined = f"leaving failed: {error}"
        with record.changed:
            self.moving = False
            if holdings is None:
                self._wants = False
                record.apply(WorkloadEvent.DECLINE)
                log.info("wooly: %s stays on its devices: %s", record.name, declined)
            else:
                self._reached("leaving")
                record.apply(WorkloadEvent.AWAY, holdings)
                log.info("wooly: %s left its devices: %s", record.name, leaving.reason)
            self._ended(leaving, declined)
            self._follow_sleep()

    def _declines(self, leaving: Leaving) -> str:
        """Return why it does not even try to leave."""
        record = self._record
        if record.state is not WorkloadState.RESIDENT:
            return f"it is {record.state.value}"
        if record.growing:
            return "it waits for more memory, or allocates it"
        if leaving.within_s and time.monotonic() - leaving.since > leaving.within_s:
            return "the time for it was over"
        return record.refusal

    def _reached(self, step: str) -> None:
        with self._record.changed:
            if step == "leaving" and self._record.state is WorkloadState.DRAINING:
                self._record.apply(WorkloadEvent.LEAVE)

    def _ended(self, leaving: Leaving, declined: str) -> None:
        leaving.end(declined)
        self._leavings.clear()
        self._record.changed.notify_all()

    def _follow_sleep(self) -> None:
        """Take up the state of an engine that fell asleep while it moved."""
        if self._record.asleep and self._record.state is WorkloadState.RESIDENT:
            self._record.become(WorkloadState.SWAPPED, known=False)
            self.refresh()

    def _return(self) -> None:
        """Take memory and return, once. What fails is tried again later."""
        record = self._record
        with record.changed:
            if not self._to_return():
                return
            self._joins = record.joins
            withdrawal = self._withdrawal = Withdrawal()
            needs = record.missing()
        try:
            self._room.take(needs, withdrawal)
        except RequestCancelledError:
            self._release()
        except StoreUnavailableError as error:
            self._release()
            self._return_alone(str(error))
        except WoolyError as error:
            self._release()
            self._stay(f"the store grants no memory: {error} [{error.code}]", next(self._delays))
        else:
            with record.changed:
                if not self._to_return():
                    record.release()  # it ends the grant
                    return
                record.apply(WorkloadEvent.RETURN)
            self._come_back()
        finally:
            with record.changed:
                self._withdrawal = None

    def _release(self) -> None:
        with self._record.changed:
            self._record.release()

    def _stay(self, reason: str, for_s: float) -> None:
        """Stay away for some seconds, and say why, unless that was said already."""
        with self._record.changed:
            self._retry_at = time.monotonic() + for_s
            if reason != self._said:
                log.warning("wooly: %s waits to return to its devices: %s", self._record.name, reason)
            self._said = reason

    def _return_alone(self, why: str) -> None:
        """Return without a store, if no other process does and enough memory is free."""
        record = self._record
        with record.changed:
            needs = record.whole()
        with alone.memory(needs) as blocked:
            if blocked:
                self._stay(f"{why}, and {blocked}", ALONE_EVERY_S)
                return
            with record.changed:
                if not self._to_return():
                    return
                log.warning("wooly: %s returns to its devices by itself: %s", record.name, why)
                record.apply(WorkloadEvent.RETURN)
            self._come_back()

    def _come_back(self) -> None:
        record = self._record
        with record.changed:
            self.moving = True
        reason, holdings = "", None
        try:
            self.bring_back()
            self._prepared = False
            holdings = self._mover.come_back()
        except WoolyError as error:
            reason = f"{error} [{error.code}]"
        except Exception as error:
            log.exception("wooly: %s could not return to its devices", record.name)
            reason = f"{type(error).__name__}: {error}"
        with record.changed:
            self.moving = False
            if holdings is None:
                record.apply(WorkloadEvent.ROLL_BACK)
                self._stay(reason, next(self._delays))
                return
            self._wants = False
            self._delays, self._retry_at, self._said = delays(), 0.0, ""
            record.apply(WorkloadEvent.BACK, holdings)
            self._follow_sleep()
