"""The part of one engine core in turns of its devices: asks before a batch is scheduled, and says what is in flight.

A batch is in flight from when it is scheduled until its result is there. One that has no tokens does not count: it
only tells workers of requests that ended.

Relies on ``Scheduler.schedule`` being called once for each batch, on ``total_num_scheduled_tokens`` of what it returns,
and on ``Scheduler.update_from_output`` being called with that, in the same order, when the result is there.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from shared_store.compute.gate import ComputeGate
from wooly_vllm.residency.short_steps import ShortSteps

_LOOK_S: Final = 1.0
"""How long an engine in its caller's process waits for its turn, between two looks at its own state."""


class Turns:
    """Turns of one engine core. Its methods are called in methods of the engine, of which only one runs at a time.

    Attributes:
        compute: asks the arbiter. Without one, steps are free.
        exemption: why the engine is never held; empty: it may be.
    """

    def __init__(self, engine: Any, changed: Callable[[], None], exemption: str) -> None:
        """Hook the engine's scheduler.

        Args:
            engine: vLLM's ``EngineCore``.
            changed: called in another thread when steps may begin again.
            exemption: why the engine is never held; empty: it may be.
        """
        self.compute = ComputeGate(changed)
        self.exemption = exemption
        self._batches: deque[tuple[float, int]] = deque()
        self._ended_at = 0.0
        self._short = ShortSteps(engine)
        self._hook(engine.scheduler)

    def _hook(self, scheduler: Any) -> None:
        schedule, update = scheduler.schedule, scheduler.update_from_output

        @functools.wraps(schedule)
        def scheduling(*args: Any, **kwargs: Any) -> Any:
            with self._short.applied(shorten=not self.exemption and self.compute.short):
                output = schedule(*args, **kwargs)
            tokens = output.total_num_scheduled_tokens
            if tokens:
                self._batches.append((time.monotonic(), tokens if self._short.prefills(tokens) else 0))
                self.compute.begin()
            return output

        @functools.wraps(update)
        def updating(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if scheduled.total_num_scheduled_tokens:
                self.left(len(self._batches) - 1)
            return update(scheduled, *args, **kwargs)

        scheduler.schedule, scheduler.update_from_output = scheduling, updating

    @property
    def free(self) -> bool:
        """Whether a step may begin now. Makes no system call."""
        return bool(self.exemption) or self.compute.may_begin()

    def held(self) -> bool:
        """Return whether the next step has to wait. If so, ``changed`` is called when it need not any more."""
        if self.free:
            return False
        self.compute.hold()
        return not self.compute.may_begin()

    def wait(self) -> None:
        """Wait until the next step may begin, for about a second at most."""
        self.compute.wait(_LOOK_S)

    def work(self, *, has: bool) -> None:
        """Say whether a request could run."""
        self.compute.work(has=has)
        if has:
            self.held()

    def left(self, batches: int) -> None:
        """Say that at most so many batches are in flight. After a step that failed, fewer are than its results say."""
        if len(self._batches) <= batches:
            return
        now = time.monotonic()
        while len(self._batches) > batches:
            begun_at, tokens = self._batches.popleft()
            if tokens:
                self._short.measure(tokens, now - max(begun_at, self._ended_at))
            self._ended_at = now
            self.compute.end(len(self._batches))

    def close(self) -> None:
        """Leave the arbiter. Idempotent."""
        self.compute.close()
