"""The agent of a workload: joins the store, takes memory before the engine allocates, and moves the engine in and out.

One agent for each workload, in the process that speaks for it. The agent connects with a session of its own. A thread
of its own calls the :class:`~shared_store.overcommit.mover.Mover`, one method at a time; all other methods may be
called from any thread.

A restarted store learns the workload's state when the session reconnects. Without a store for :data:`ALONE_AFTER_S` a
swapped workload with requests returns by itself, see :mod:`shared_store.overcommit.alone`.

A store that does not have the capability ``workloads`` lists no workload and asks for nothing: the agent is *idle*,
says so once, and lets everything pass at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from shared_store.base.workload_states import WorkloadState
from shared_store.client.session import Session
from shared_store.overcommit.mover import Mover
from shared_store.protocol.messages.identity import Identity

ALONE_AFTER_S: Final = 10.0
"""Seconds without a store after which a swapped workload that has requests returns by itself."""


class Agent:
    """Speaks for one workload.

    Attributes:
        workload: the id of the workload, for ``WOOLY_MEMBER_OF`` of its other processes.
        name: the workload's name; after :meth:`join` the one that is unique in the store.
        priority: 0 (highest) to 4; after :meth:`join` the one that the store admits.
    """

    def __init__(
        self,
        session_factory: Callable[[Identity], Session],
        mover: Mover,
        *,
        kind: str,
        name: str,
        devices: Sequence[str],
        refusal: str = "",
        priority: int | None = None,
        swap: bool | None = None,
    ) -> None:
        """Make an agent. Nothing is connected before :meth:`join`.

        Args:
            session_factory: connects to the store with an identity; :func:`connect` is the usual one.
            mover: moves the engine.
            kind: ``vllm`` or ``transformers``.
            name: of the workload, where ``WOOLY_WORKLOAD`` is not set.
            devices: the store's names of the workload's devices: ``cpu`` or UUIDs of GPUs.
            refusal: why the workload must never be swapped out; empty if it may be.
            priority: 0 (highest) to 4; None: from the environment.
            swap: whether the user lets it be swapped out; None: from the environment.
        """

    def join(self) -> None:
        """Connect, and join the store as a workload that starts: swapped, without memory. Starts the agent's thread.

        Raises:
            WoolyError: no session could be made. A store that does not list workloads is no error.
        """

    @property
    def state(self) -> WorkloadState:
        """Where the workload's memory is. ``RESIDENT`` where the store lists no workloads."""

    @property
    def listed(self) -> bool:
        """Whether the workload has joined a store."""

    @property
    def asleep(self) -> bool:
        """Whether the workload left by itself, and stays away until :meth:`take_room`."""

    def take_room(
        self,
        needs: Mapping[str, int],
        timeout_s: float,
        progress: Callable[[str], None] | None = None,
    ) -> float:
        """Wait until the workload may allocate: for a start, and to wake up after :meth:`left_by_itself`.

        Ends with :meth:`joined_resident`, or with :meth:`left_by_itself` if the allocation failed. The state is
        ``RETURNING`` until then. Returns at once if the store lists no workloads.

        Args:
            needs: private bytes that will be allocated on each device.
            timeout_s: seconds to wait.
            progress: called with the reason whenever that changes, in the thread that reads from the store.

        Returns:
            The seconds that it waited.

        Raises:
            TimedOutError: there was no memory in time. The message explains which workloads have it.
            OutOfMemoryError: there will never be so much.
        """

    def joined_resident(self) -> None:
        """Say that everything is on the devices after a start or a wake-up: the grant ends, swaps are possible."""

    def changed(self) -> None:
        """Report the bytes of :meth:`Mover.holdings` again, because the engine allocated or freed memory."""

    def wanted(self) -> bool:
        """Say that there is work. Does not block; cheap enough for every request.

        Call it for every request that arrives, and after a move if requests were left running or waiting.

        Returns:
            Whether the workload is resident. If not, it takes memory and returns as soon as it can.
        """

    def unwanted(self) -> None:
        """Say that nothing is left to do: requests were aborted. A wait for memory to return ends."""

    def ensure_resident(self, timeout_s: float | None = None) -> None:
        """Block until the workload is resident. Must not be called in a thread that the mover needs.

        Args:
            timeout_s: seconds to wait; None: without a limit.

        Raises:
            TimedOutError: it could not return in time. The message explains why.
            DeclinedError: it left by itself, and must be woken up.
        """

    def left_by_itself(self) -> None:
        """Say that the engine gave its memory up by request of its user: it stays away until :meth:`take_room`."""

    def refuse(self, reason: str) -> None:
        """Say from here on why the workload must not be swapped out; empty: it may be again."""

    def explain(self) -> str:
        """Return what the workload waits for, which workloads have it, and what would help; empty if unknown."""

    def close(self) -> None:
        """Leave the store: the workload's entry ends. Idempotent. Does not move memory."""


def connect(identity: Identity) -> Session:
    """Connect to this user's store as an agent does. Raises as :meth:`Session.connect` does."""
