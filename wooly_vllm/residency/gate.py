"""The gate of one engine core: its steps pass while the engine is on its devices, and wait while it is not.

Closed, the scheduler schedules nothing (``PAUSED_ALL``), batches in flight have ended, and running requests keep their
blocks. New requests queue, aborts are carried out, and questions that need no device are answered. Everything else
brings the engine back first.

Relies on ``Scheduler.set_pause_state`` and ``pause_state``, and on a batch queue from which each step takes a batch
when nothing may be scheduled.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from wooly_vllm import compat
from wooly_vllm.residency.boundary import Boundary, LoopBoundary, boundary_of

ANSWERED_AWAY = frozenset(
    {
        "get_kv_cache_group_metadata",
        "get_supported_tasks",
        "get_weight_version",
        "is_scheduler_paused",
        "is_sleeping",
        "list_loras",
        "reset_prefix_cache",
        "set_weight_version",
    }
)
"""Utilities of an engine core that need no device."""

PASSES_AWAY = frozenset({"check_health", "get_supported_tasks", "list_loras", "shutdown"})
"""Methods of workers that need no device, beside wooly's own."""

OWN = "wooly_"
"""How the names of wooly's methods of workers begin."""

_LINGER_S = 0.05
"""How long the loop of an engine that ends waits for its return, between two looks at its messages."""


class Agent(Protocol):
    """The part of a workload's agent that a gate uses."""

    def wanted(self) -> bool:
        """Say that there is work. Does not block."""

    def unwanted(self) -> None:
        """Say that nothing is left to do."""

    def ensure_resident(self, timeout_s: float | None = None) -> None:
        """Block until the workload is resident."""

    def close(self) -> None:
        """End: whoever waits for its return is told so."""


class Gate:
    """The gate of one engine core.

    Attributes:
        boundary: of the engine's steps.
        away: whether it is closed. Changes at step boundaries only.
    """

    def __init__(self, engine: Any, agent: Agent, changed: Callable[[], None]) -> None:
        """Begin open.

        Args:
            engine: vLLM's ``EngineCore``.
            agent: brings the engine back.
            changed: called when requests came or went while the gate was closed.
        """
        (self._states,) = compat.find("vllm.v1.core.sched.interface", "PauseState")
        self._engine = weakref.ref(engine)
        self._agent = agent
        self._changed = changed
        self.boundary: Boundary = boundary_of(engine)
        self.away = False
        self._before = self._states.UNPAUSED
        self._outputs: deque[Any] = deque()
        self._closing = False
        self._failed: BaseException | None = None
        self._deferred: list[tuple[Any, ...]] = []

    @property
    def engine(self) -> Any:
        """The engine core."""
        engine = self._engine()
        assert engine is not None  # noqa: S101 - the engine's own methods, and posted functions, are all that asks
        return engine

    # At a step boundary, for the engine's mover.

    def close(self) -> None:
        """Pause, and end the batches in flight. Their outputs are delivered as ever."""
        engine = self.engine
        self._before = engine.scheduler.pause_state
        engine.scheduler.set_pause_state(self._states.PAUSED_ALL)
        self._closing = True
        try:
            while engine.batch_queue:
                self._make_step(engine)
        finally:
            self._closing = False

    def shut(self) -> None:
        """Say that the engine left: from here on, work waits for its return."""
        self.away = True
        if self._needs_return():
            self._agent.wanted()

    def open(self) -> None:
        """Let steps pass again, as before :meth:`close`, and carry out what was deferred."""
        engine = self.engine
        self.away = False
        engine.scheduler.set_pause_state(self._before)
        deferred, self._deferred = self._deferred, []
        for message in deferred:
            engine._handle_client_request(*message)

    def fail(self, error: BaseException) -> None:
        """End the engine at its next step: a worker's memory is in an unknown state, and nothing may be computed."""
        self.away = True
        self._failed = error
        compat.logger().error("wooly: this engine ends, as a move of its memory failed: %s", error)
        self._agent.close()

    def has_work(self) -> bool:
        """Return True if a request could run, were the gate open."""
        scheduler = self.engine.scheduler
        running, waiting = scheduler.get_request_counts()
        paused = self._before if self.away else scheduler.pause_state
        if paused == self._states.PAUSED_ALL:
            return False
        waiting -= getattr(scheduler, "num_waiting_for_streaming_input", 0)
        return bool(running or (waiting > 0 and paused == self._states.UNPAUSED))

    def _needs_return(self) -> bool:
        """Return True if somebody waits for steps, for a deferred message, or for the end of all requests."""
        return self.has_work() or bool(self._deferred) or bool(getattr(self.engine, "_idle_state_callbacks", ()))

    def _check(self) -> None:
        if self._failed is not None:
            raise RuntimeError(f"a move of this engine's memory failed: {self._failed}") from self._failed

    def _make_step(self, engine: Any) -> None:
        if isinstance(self.boundary, LoopBoundary):
            engine._process_engine_step()
            return
        outputs, executed = engine.step_fn()
        engine.post_step(executed)
        if outputs:
            self._outputs.append(outputs)

    # In the engine's own methods.

    def step(self, stock: Callable[[], Any]) -> Any:
        """Make a step, or none while the engine is away. In the caller's process, wait for its return first."""
        nothing: tuple[dict[int, Any], bool] = ({}, False)
        while True:
            with self.boundary.entered():
                if self._outputs and not self._closing:
                    return self._outputs.popleft(), False
                if not self.away:
                    return stock()
                self._check()
                if isinstance(self.boundary, LoopBoundary):
                    if not self.engine.is_running():
                        self.boundary.linger(_LINGER_S)
                    return nothing
                if not self.has_work():
                    return nothing
            self._agent.ensure_resident()

    def changing(self, stock: Callable[[], Any]) -> Any:
        """Add or abort requests."""
        with self.boundary.entered():
            result = stock()
            if self.away:
                self._changed()
                if self._needs_return():
                    self._agent.wanted()
                else:
                    self._agent.unwanted()
            return result

    def message(self, stock: Callable[[], None], message: tuple[Any, ...], utility: str) -> None:
        """Handle a message to the loop. A utility that needs the devices is deferred until the engine is back."""
        with self.boundary.entered():
            if self.away and utility and utility not in ANSWERED_AWAY:
                compat.logger().info("wooly: %s brings this engine back to its devices first", utility)
                self._deferred.append(message)
                self._agent.wanted()
                return
            stock()

    def resident(self, stock: Callable[[], Any]) -> Any:
        """Call a method that needs the devices, after the engine's return."""
        while True:
            with self.boundary.entered():
                if not self.away:
                    return stock()
                self._check()
                self._agent.wanted()
                if isinstance(self.boundary, LoopBoundary):
                    self.boundary.wait(lambda: not self.away or self._failed is not None)
                    self._check()
                    return stock()
            self._agent.ensure_resident()

    def loop_has_work(self, stock: Callable[[], bool]) -> bool:
        """Return whether the loop should make steps. An engine that ends, but finishes its requests first, lingers."""
        if not self.away:
            return stock()
        return self._failed is not None or (not self.engine.is_running() and self.has_work())

    def idle(self, stock: Callable[[], None]) -> None:
        """Let the loop say that it is idle, to those that wait for the end of all requests."""
        if not self.away:
            stock()

    def paused(self, stock: Callable[[], bool]) -> bool:
        """Return whether the user paused the engine."""
        return bool(self._before != self._states.UNPAUSED) if self.away else stock()

    def guard(self, executor: Any, names: Iterable[str]) -> None:
        """Let methods of an executor that need the devices wait, whoever calls them."""
        for name in names:
            stock = getattr(executor, name, None)
            if stock is not None:
                setattr(executor, name, self._guarded(stock))

    def _guarded(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def method(*args: Any, **kwargs: Any) -> Any:
            passes = _passes(args[0] if args else kwargs.get("method"))
            with self.boundary.calling():  # an executor has one answer at a time
                if passes or not self.away:
                    return stock(*args, **kwargs)
            return self.resident(lambda: stock(*args, **kwargs))

        return method


def _passes(method: Any) -> bool:
    return isinstance(method, str) and (method.startswith(OWN) or method in PASSES_AWAY)
