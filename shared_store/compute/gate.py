"""The workload's side of the arbiter: says what its steps do, and whether the next one may begin.

Without an arbiter every step may begin at once. While no other workload shares a device, a step costs a few stores to
memory and no system call.
"""

from __future__ import annotations

from collections.abc import Callable

from shared_store.runtime.fds import OwnedFd


class ComputeGate:
    """One for each workload. Methods may be called from any thread."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """Begin without an arbiter.

        Args:
            changed: called in a thread of this gate when steps may begin again; also when the arbiter is gone.
        """
        raise NotImplementedError

    def attach(self, page: OwnedFd, bell: OwnedFd, lost: Callable[[], None]) -> None:
        """Obey an arbiter from here on, beginning with the present state. Closes both when it ends.

        Args:
            page: the compute page.
            bell: socket to the arbiter.
            lost: called once, in a thread of this gate, when the arbiter is gone. Steps begin freely again.

        Raises:
            ProtocolError: the descriptors are something else.
        """
        raise NotImplementedError

    @property
    def attached(self) -> bool:
        """Whether there is an arbiter."""
        raise NotImplementedError

    def work(self, *, has: bool) -> None:
        """Say whether there is work: requests that could run. Rings if others share a device."""
        raise NotImplementedError

    def may_begin(self) -> bool:
        """Return whether a step may begin now. Makes no system call."""
        raise NotImplementedError

    def hold(self) -> None:
        """Say that a step would begin, were it not held. Idempotent; ends with :meth:`begin`, or without work."""
        raise NotImplementedError

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until a step may begin, as :meth:`hold` says. Returns False if the time is over."""
        raise NotImplementedError

    def begin(self) -> None:
        """Say that a step begins: one more batch is in flight."""
        raise NotImplementedError

    def end(self, in_flight: int = 0) -> None:
        """Say that a step ended, and how many batches are left in flight."""
        raise NotImplementedError

    @property
    def short(self) -> bool:
        """Whether steps should be short, as a more important workload works, or did within the last second."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the arbiter. Idempotent."""
        raise NotImplementedError
