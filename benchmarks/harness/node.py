"""A temporary store and the workers that use it."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.processes import Child, end_all
from benchmarks.harness.store import TemporaryStore


class Node(TemporaryStore):
    """As a context manager, ends all workers, then stops the store they started, and removes the directory."""

    def __init__(self, worker: str = "engine-worker", *, own_sessions: bool = True) -> None:
        """``worker`` is the command of the workers; see ``benchmarks/__main__.py``, and :class:`Child`."""
        super().__init__()
        self._own_sessions = own_sessions
        self._worker = worker
        self._children: list[Child] = []

    def close(self) -> None:
        """End all workers and the store. Idempotent."""
        self.end_all()
        super().close()

    def end_all(self) -> None:
        """End all workers. The store continues to run."""
        end_all(self._children)

    def launch(self, name: str, role: str, job: dict[str, Any], *, worker: str = "", **environment: str) -> Child:
        """Start a worker of this node, which finds the node's store."""
        log = self.scratch / f"{len(self._children):03d}-{role}.log"
        environment |= {"WOOLY_RUNTIME_DIR": str(self.directory)}
        command = worker or self._worker
        self._children.append(Child(name, command, role, job, log, environment, own_session=self._own_sessions))
        return self._children[-1]
