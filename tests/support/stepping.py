"""A workload in this process that makes steps without computing anything, for tests of how others wait for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from support.holders import Holder

from shared_store.base.workload_settings import WorkloadSettings
from shared_store.client.session import Session
from shared_store.compute.gate import ComputeGate
from shared_store.overcommit.agent import Agent
from shared_store.overcommit.mover import Holdings

STEP_S = 0.02


class Stepping:
    """A workload of a CPU. Within :meth:`working` it always has a step in flight, or the next one waits for its turn.

    `steps`: made so far.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        priority: int = 0,
        share: float = 0.0,
        exclusive: bool = False,
        ungated: str = "",
    ) -> None:
        self.steps = 0
        self._closed = False
        self._directory = directory
        self._holder = Holder(4096)
        self._gate = ComputeGate(lambda: None)
        self._agent = Agent(
            lambda identity: Session.connect(directory, name=name, autostart=False, identity=identity),
            self._holder,
            kind="vllm",
            name=name,
            devices=("cpu",),
            settings=WorkloadSettings(name, priority, swap=False, compute_share=share, exclusive=exclusive),
        )
        try:
            self._agent.join()
            self._agent.joined_resident(Holdings())
            self._agent.compute(self._gate, ungated)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Its name, unique in the store."""
        return self._agent.name

    @property
    def id(self) -> str:
        """Its id."""
        return self._agent.workload

    def session(self) -> Session:
        """Return a session of another client."""
        return Session.connect(self._directory, autostart=False)

    @property
    def attached(self) -> bool:
        """Whether it has an arbiter."""
        return self._gate.attached

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Make steps in a thread."""
        stop = threading.Event()
        thread = threading.Thread(target=self._work, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _work(self, stop: threading.Event) -> None:
        self._gate.work(has=True)
        while not stop.is_set():
            if self._gate.wait(0.1):
                self._gate.begin()
                stop.wait(STEP_S)
                self._gate.end()
                self.steps += 1
        self._gate.work(has=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the store. Idempotent."""
        if not self._closed:
            self._closed = True
            self._agent.close()
            self._holder.close()
