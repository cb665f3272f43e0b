"""The agent of a workload: joins the store, takes memory before the engine allocates, and moves the engine in and out.

One agent for each workload, in the process that speaks for it, with a session of its own. A thread of its own calls the
:class:`~shared_store.overcommit.mover.Mover`, one method at a time (:mod:`shared_store.overcommit.moves`); all other
methods may be called from any thread.

A restarted store learns the workload's state when the session reconnects. Without a store for
:data:`~shared_store.overcommit.room.ALONE_AFTER_S` a swapped workload that has requests returns by itself, see
:mod:`shared_store.overcommit.alone`.

A store that does not list workloads asks for nothing, and everything passes at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from shared_store.base.errors import (
    ConnectionLostError,
    DeclinedError,
    StoreUnavailableError,
    TimedOutError,
    WoolyError,
)
from shared_store.base.workload_settings import WorkloadSettings
from shared_store.base.workload_states import WorkloadEvent, WorkloadState
from shared_store.client.serving import StoreCall
from shared_store.client.session import Session
from shared_store.client.workload import describe
from shared_store.compute.gate import ComputeGate
from shared_store.overcommit.checkpoints.helper import HelperProcess
from shared_store.overcommit.limit import Limit
from shared_store.overcommit.mover import Holdings, Mover
from shared_store.overcommit.moves import Leaving, Moves, Preparing
from shared_store.overcommit.record import AWAY, Record
from shared_store.overcommit.room import Room
from shared_store.protocol import messages
from shared_store.protocol.messages.identity import Identity

log = logging.getLogger(__name__)

_JOIN_ATTEMPTS: Final = 3
"""Sessions that are made to join: a store may end between the greeting and that."""

_EXPLAIN_TIMEOUT_S: Final = 5.0


class Agent:
    """Speaks for one workload."""

    def __init__(
        self,
        session_factory: Callable[[Identity], Session],
        mover: Mover,
        *,
        kind: str,
        name: str,
        devices: Sequence[str],
        refusal: str = "",
        settings: WorkloadSettings | None = None,
    ) -> None:
        """Make an agent. Nothing is connected before :meth:`join`.

        Args:
            session_factory: connects to the store with an identity; :func:`connect` is the usual one.
            mover: moves the engine.
            kind: ``vllm`` or ``transformers``.
            name: of the workload, where neither the settings nor the environment have one.
            devices: the store's names of the workload's devices: ``cpu`` or UUIDs of GPUs.
            refusal: why the workload must never be swapped out; empty if it may be.
            settings: of the workload, from the engine's options. What they leave out is the environment's.

        Raises:
            ConfigError: an environment variable has an invalid value.
        """
        self._record = record = Record(name, devices, refusal)
        self._identity = describe(kind, devices, settings, name=name, member_of=record.workload)
        if not self._identity.swap and not refusal:
            record.refusal = "its user does not let it be swapped out"
        record.name, record.priority = self._identity.name, self._identity.priority
        self._factory = session_factory
        self._mover = mover
        self._session: Session | None = None
        self._moves: Moves | None = None
        self._room: Room | None = None
        self._helper: HelperProcess | None = None
        self._reason = ""
        self._progress: Callable[[str], None] | None = None
        self._limit: Limit | None = None

    @property
    def workload(self) -> str:
        """The id of the workload, for ``WOOLY_MEMBER_OF`` of its other processes."""
        return self._record.workload

    @property
    def devices(self) -> tuple[str, ...]:
        """The store's names of the workload's devices."""
        return self._record.devices

    @property
    def name(self) -> str:
        """The workload's name; after :meth:`join` the one that is unique in the store."""
        return self._record.name

    @property
    def priority(self) -> int:
        """The workload's priority, 0 (highest) to 4; after :meth:`join` the one that the store admits."""
        return self._record.priority

    @property
    def state(self) -> WorkloadState:
        """Where the workload's memory is. ``RESIDENT`` where the store lists no workloads."""
        return self._record.state

    @property
    def listed(self) -> bool:
        """Whether the workload has joined a store that lists it."""
        return bool(self._record.listed)

    @property
    def asleep(self) -> bool:
        """Whether the workload left by itself, and stays away until :meth:`take_room`."""
        return self._record.asleep

    def join(self) -> None:
        """Connect, and join the store as a workload that starts: swapped, without memory. Starts the agent's thread.

        Raises:
            ExclusiveError: the devices of another workload, or of this one, are for one alone.
            WoolyError: no session could be made. A store that does not list workloads is no error.
        """
        for attempt in range(1, _JOIN_ATTEMPTS + 1):
            session = self._factory(self._identity)
            try:
                session.serve(messages.SwapOut, self._swap_out)
                session.serve(messages.SwapIn, self._swap_in)
                session.serve(messages.PrepareCheckpoint, self._prepare_checkpoint)
                session.hear("room", self._hear)
                self._record.report = session.workloads.report
                session.workloads.join(self._record)
            except ConnectionLostError:
                session.close()
                if attempt == _JOIN_ATTEMPTS:
                    raise
            except BaseException:
                session.close()
                raise
            else:
                break
        if self._identity.exclusive and not session.supports(messages.EXCLUSIVE):
            log.warning(
                "wooly: the store (version %s) does not keep other workloads off the devices of %s: `wooly upgrade`",
                session.store_version,
                self._record.name,
            )
        self._session = session
        self._room = Room(self._record, session)
        self._moves = Moves(self._record, self._mover, self._room)
        self._moves.start()

    def offer_checkpoints(self, directory: Path) -> None:
        """Let the store have this process, and its family, taken off its GPU while the workload is swapped.

        Call it once, after :meth:`join`, only where nothing but the mover's return calls CUDA while it is swapped.

        Args:
            directory: the store's runtime directory.
        """
        if not self.listed or self._moves is None or self._helper is not None:
            return
        self._helper = HelperProcess(directory, self.workload)
        self._moves.bring_back = self._helper.bring_back
        self._helper.start()
        with self._record.changed:
            self._record.deep = True
            self._record.say()

    def close(self) -> None:
        """Leave the store: the workload's entry ends. Idempotent. Does not move memory."""
        if self._helper is not None:
            self._helper.close()
        if self._moves is not None:
            self._moves.close()
        if (limit := self._limit) is not None:
            limit.end()
        if self._session is not None:
            self._session.workloads.leave_compute()
            self._session.close()

    # Starts, wake-ups, and what the engine does by itself.

    def take_room(
        self, needs: Mapping[str, int], timeout_s: float, progress: Callable[[str], None] | None = None
    ) -> float:
        """Wait until the workload may allocate: to start, to wake up after :meth:`left_by_itself`, or to grow.

        Ends with :meth:`joined_resident`, or with :meth:`left_by_itself` if the allocation failed. It is not swapped
        out until then. Returns at once if the store lists no workloads. Without a store for
        :data:`~shared_store.overcommit.room.ALONE_AFTER_S` it returns, too: the engine allocates as without one.

        Args:
            needs: private bytes that will be allocated on each device.
            timeout_s: seconds to wait.
            progress: called with the reason whenever that changes, in the thread that reads from the store.

        Returns:
            The seconds that it waited.

        Raises:
            TimedOutError: there was no memory in time. The message explains which workloads have it.
            OutOfMemoryError: there will never be so much.
            DeclinedError: it is between its states: :meth:`ensure_resident` comes first.
            RequestCancelledError: the agent was closed.
        """
        record, room = self._record, self._room
        with record.changed:
            if room is None or not record.listed:
                return 0.0
            grows = record.state is WorkloadState.RESIDENT
            if not (grows or (record.state in AWAY and (record.starting or record.asleep))):
                raise DeclinedError(f"this workload is {record.state.value}: it has to return first")
            record.growing = grows
            if record.starting:
                record.expect(needs)
        self._progress = progress
        limit = self._limit = Limit(timeout_s, self.explain, record)
        try:
            with limit:
                waited = room.take(needs, limit.withdrawal)
        except StoreUnavailableError as error:
            log.warning("wooly: this workload allocates without being granted memory: %s", error)
            waited = 0.0
        except BaseException:
            with record.changed:
                record.growing = False
                record.release()
            if limit.passed:
                raise TimedOutError(f"no memory was free within {timeout_s:.0f} s. {limit.reason}".rstrip()) from None
            raise
        finally:
            self._progress = self._limit = None
        with record.changed:
            if not grows and record.state in AWAY:  # a store that came meanwhile may list no workloads
                record.apply(WorkloadEvent.RETURN)
        return waited

    def joined_resident(self, holdings: Holdings | None = None) -> None:
        """Say that everything is on the devices after a start, a wake-up or a growth: the grant ends.

        Args:
            holdings: the bytes that it has; None: the agent asks the mover, in its own thread.
        """
        record = self._record
        with record.changed:
            record.starting = record.asleep = record.growing = False
            self._moved_by_itself(WorkloadState.RESIDENT, holdings)

    def left_by_itself(self, holdings: Holdings | None = None) -> None:
        """Say that the engine released its memory by request of its user: it stays away until :meth:`take_room`.

        Args:
            holdings: the bytes that it has; None: the agent asks the mover, in its own thread.
        """
        record = self._record
        with record.changed:
            record.asleep, record.growing = True, False
            if self._moves is not None:
                self._moves.unwanted()
                if self._moves.moving:
                    return  # the end of the move does it
            self._moved_by_itself(WorkloadState.SWAPPED, holdings)

    def changed(self, holdings: Holdings | None = None) -> None:
        """Report the bytes again, because the engine allocated or freed memory.

        Args:
            holdings: the bytes that it has; None: the agent asks the mover, in its own thread.
        """
        with self._record.changed:
            if holdings is not None:
                self._record.holdings = holdings
                self._record.say()
            elif self._moves is not None:
                self._moves.refresh()

    def refuse(self, reason: str) -> None:
        """Say from here on why the workload must not be swapped out; empty: it may be again."""
        with self._record.changed:
            self._record.refusal = reason
            self._record.say()

    def _moved_by_itself(self, state: WorkloadState, holdings: Holdings | None) -> None:
        """Take up a state. Without the bytes, the store hears of it when the agent has asked for them."""
        record = self._record
        if holdings is None and self._moves is not None:
            record.become(state, known=False)
            self._moves.refresh()
        else:
            record.become(state, holdings)

    def compute(self, gate: ComputeGate, ungated: str = "") -> None:
        """Let the workload take part in turns of its devices, from here on and with each later store, too.

        Call it after the first :meth:`joined_resident`, and again when ``ungated`` changes. Without a store, or with
        one that has no arbiter, the gate stays free. :meth:`close` closes the gate.

        Args:
            gate: of the workload's steps.
            ungated: why the workload must never be held; empty: it may be. It counts for the others all the same.
        """
        if self._session is not None:
            self._session.workloads.join_compute(gate, ungated)

    # Work.

    def wanted(self) -> bool:
        """Say that there is work. Does not block; cheap enough for every request.

        Call it for every request that arrives, and after a move if requests were left running or waiting.

        Returns:
            Whether the workload is resident. If not, it takes memory and returns as soon as it can, unless it starts
            or left by itself.
        """
        if self._record.state is WorkloadState.RESIDENT:
            return True
        if self._moves is not None:
            self._moves.wanted()
        return self.state is WorkloadState.RESIDENT

    def unwanted(self) -> None:
        """Say that nothing is left to do: requests were aborted. A wait for memory to return ends."""
        if self._moves is not None:
            self._moves.unwanted()

    def ensure_resident(self, timeout_s: float | None = None) -> None:
        """Block until the workload is resident. Must not be called in a thread that the mover needs.

        Args:
            timeout_s: seconds to wait; None: without a limit.

        Raises:
            TimedOutError: it could not return in time. The message explains why.
            DeclinedError: it left by itself and must be woken up, or it ends.
        """
        if self._record.state is WorkloadState.RESIDENT or self._moves is None:
            return
        with self._moves.waiting() as wait:
            if not wait(timeout_s):
                raise TimedOutError(f"{self.name} could not return to its devices in time. {self.explain()}".rstrip())

    def explain(self) -> str:
        """Return what the workload waits for, which workloads have it, and what would help, as far as is known."""
        session = self._session
        if session is not None and session.alive and self._record.listed:
            with contextlib.suppress(WoolyError):  # the last reason is known anyway
                lines = session.workloads.explain(self._record.name, _EXPLAIN_TIMEOUT_S).lines
                return "; ".join(lines)
        return self._reason

    def _hear(self, reason: str) -> None:
        """Hear why the store has not granted memory yet."""
        self._reason = reason
        if (progress := self._progress) is not None:
            progress(reason)
        else:
            log.info("wooly: %s waits for memory: %s", self._record.name, reason)

    # Requests of the store.

    def _swap_out(self, request: messages.SwapOut, call: StoreCall) -> str | None:
        record, moves = self._record, self._moves
        with record.changed:
            if record.state in AWAY:
                return "it is away already"
            if moves is None or record.state is WorkloadState.RETURNING:
                raise DeclinedError("it is returning")
            call.accept()
            leaving = moves.leave(Leaving(request.reason, request.active, request.within_s))
        call.when_cancelled(self._wake)
        with record.changed:
            record.changed.wait_for(lambda: leaving.ended or call.cancelled.is_set())
            if not leaving.ended:
                moves.withdraw(leaving)
                raise DeclinedError("the store does not wait any more")
        if leaving.declined:
            raise DeclinedError(leaving.declined)
        return None

    def _swap_in(self, _request: messages.SwapIn, call: StoreCall) -> str | None:
        moves = self._moves
        if moves is None:
            raise DeclinedError("it is starting")
        call.accept()
        call.when_cancelled(self._wake)
        with moves.waiting() as wait:
            wait(None, call.cancelled)
        return None

    def _prepare_checkpoint(self, _request: messages.PrepareCheckpoint, call: StoreCall) -> str | None:
        record, moves = self._record, self._moves
        if moves is None:
            raise DeclinedError("it is starting")
        call.accept()
        preparing = Preparing()
        with record.changed:
            moves.prepare(preparing)
            record.changed.wait_for(lambda: preparing.ended)
        if preparing.declined:
            raise DeclinedError(preparing.declined)
        return None

    def _wake(self) -> None:
        with self._record.changed:
            self._record.changed.notify_all()


def connect(identity: Identity) -> Session:
    """Connect to this user's store as an agent does. Raises as :meth:`Session.connect` does."""
    return Session.connect(name=f"{identity.kind} {identity.name}", identity=identity)
