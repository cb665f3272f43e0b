"""The helper of one workload: ``python -m shared_store.overcommit.checkpoints DIRECTORY WORKLOAD LEADER [PID ...]``.

A child of the workload's process ``LEADER``, which it checkpoints with its family when the store asks. Ends at the end
of its standard input; a line there brings the family back. Writes a line ``locked PID ...`` to its standard output
before it locks processes, and ``running`` once they run again, so that the next helper can be given the pids (see
:mod:`shared_store.overcommit.checkpoints.helper`).

Holds no memory of a GPU: the driver's checkpoint functions need no context.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from shared_store.base.errors import (
    ConnectionLostError,
    DeclinedError,
    StoreUnavailableError,
    UnsupportedError,
    WoolyError,
    WorkloadNotFoundError,
)
from shared_store.client.serving import StoreCall
from shared_store.client.session import Session
from shared_store.client.workload import describe
from shared_store.memory.cuda.checkpoint import Checkpoints
from shared_store.overcommit.checkpoints.checkpointer import Checkpointer
from shared_store.overcommit.checkpoints.helper import LOCKED, RUNNING
from shared_store.overcommit.checkpoints.processes import with_gpu
from shared_store.protocol import messages
from shared_store.runtime import log_lines

log = logging.getLogger(__name__)

RETRY_S = 0.2
"""Seconds between two offers to a store that the workload has not joined yet."""


class HelperServer:
    """Serves the store's requests for one workload, one at a time."""

    def __init__(self, workload: str, leader: int, pids: Sequence[int]) -> None:
        """Start the driver, and finish what a helper before this one left. ``pids``: that it had locked."""
        self._workload = workload
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._checkpointer: Checkpointer | None = None
        self.refusal = ""
        try:
            found = Checkpointer(Checkpoints(), lambda: [pid for pid in with_gpu(leader) if pid != os.getpid()])
            found.resume(pids)
        except WoolyError as error:
            self.refusal = f"{error} [{error.code}]"
        else:
            self._checkpointer = found
            if not found.pids:
                _say(RUNNING)

    def serve(self, session: Session) -> None:
        """Offer checkpoints to the store of a session, and to each later one."""
        session.serve(messages.Checkpoint, self._take_off)
        session.serve(messages.Restore, self._bring_back)
        self._wanted.set()
        while True:
            self._wanted.wait()
            self._wanted.clear()
            try:
                session.workloads.offer_checkpoints(self._offer, self._wanted.set)
            except (WorkloadNotFoundError, ConnectionLostError, StoreUnavailableError):
                if not self._wanted.wait(RETRY_S):
                    self._wanted.set()
            except UnsupportedError as error:
                log.info("wooly: %s", error)

    def _offer(self, number: int) -> messages.OfferCheckpoints:
        with self._lock:
            off = self._checkpointer is not None and bool(self._checkpointer.pids)
            return messages.OfferCheckpoints(number, self._workload, off, self.refusal)

    def _take_off(self, request: messages.Checkpoint, call: StoreCall) -> str | None:
        call.accept()
        with self._lock:
            self._usable().take_off(request.within_s, lambda pids: _say(LOCKED, *map(str, pids)))
        return None

    def _bring_back(self, _request: messages.Restore, call: StoreCall) -> str | None:
        call.accept()
        self.bring_back()
        return None

    def bring_back(self) -> None:
        """Bring the processes back to their GPU."""
        with self._lock:
            self._usable().bring_back()
            _say(RUNNING)

    def _usable(self) -> Checkpointer:
        if self._checkpointer is None:
            raise DeclinedError(self.refusal)
        return self._checkpointer


def _say(*words: str) -> None:
    """Write a line for the workload, unless that has ended: its end ends this process, too."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(" ".join(words) + "\n")
        sys.stdout.flush()


def _follow_input(server: HelperServer) -> None:
    """Bring the workload back when it wants that without a store; end with it."""
    for _ in sys.stdin:
        try:
            server.bring_back()
        except WoolyError as error:
            log.warning("wooly: the workload is still off its GPU: %s [%s]", error, error.code)
    os._exit(0)


def main() -> None:
    """Run a helper."""
    directory, workload, leader, *pids = sys.argv[1:]
    log_lines.configure("WARNING")
    server = HelperServer(workload, int(leader), [int(pid) for pid in pids])
    threading.Thread(target=_follow_input, args=(server,), daemon=True).start()
    identity = describe(name=f"checkpoints of {leader}", member_of=workload)
    session = Session.connect(Path(directory), name=f"checkpoints of {leader}", identity=identity, autostart=False)
    server.serve(session)


if __name__ == "__main__":
    main()
