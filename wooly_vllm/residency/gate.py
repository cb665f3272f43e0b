"""The gate of one engine core: its steps pass while the engine is on its devices and has its turn, and wait otherwise.

An engine that is held for others (:mod:`~.turns`) does all but steps: it takes requests and aborts, answers questions,
and leaves its devices. Results of batches in flight are taken first. Its loop waits for messages meanwhile, of which
one says that the engine is held no more.

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
from wooly_vllm.residency.turns import Turns

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
        turns: of its devices.
        away: whether it is closed. Changes at step boundaries only.
    """

    def __init__(self, engine: Any, agent: Agent, changed: Callable[[], None], exemption: str = "") -> None:
        """Begin open.

        Args:
            engine: vLLM's ``EngineCore``.
            agent: brings the engine back.
            changed: called when requests came or went while no step may begin.
            exemption: why the engine is never held for others; empty: it may be.
        """
        (self._states,) = compat.find("vllm.v1.core.sched.interface", "PauseState")
        self._engine = weakref.ref(engine)
        self._agent = agent
        self._changed = changed
        self.boundary: Boundary = boundary_of(engine)
        self.turns = Turns(engine, self.boundary.wake, exemption)
        self.away = False
        self._draining = False
        self._loop_waits = False
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
        self._say_work()
        if self._needs_return():
            self._agent.wanted()

    def open(self) -> None:
        """Let steps pass again, as before :meth:`close`, and carry out what was deferred."""
        engine = self.engine
        self.away = False
        engine.scheduler.set_pause_state(self._before)
        self._say_work()
        deferred, self._deferred = self._deferred, []
        for message in deferred:
            engine._handle_client_request(*message)

    def fail(self, error: BaseException) -> None:
        """End the engine at its next step: a worker's memory is in an unknown state, and nothing may be computed."""
        self.away = True
        self._failed = error
        self._say_work()
        compat.logger().error("wooly: this engine ends, as a move of its memory failed: %s", error)
        self._agent.close()

    def has_work(self) -> bool:
        """Return True if a request could run, were the gate open."""
        scheduler = self.engine.scheduler
        running, waiting = scheduler.get_request_counts()
        paused = self._before if self.away or self._draining else scheduler.pause_state
        if paused == self._states.PAUSED_ALL:
            return False
        waiting -= getattr(scheduler, "num_waiting_for_streaming_input", 0)
        return bool(running or (waiting > 0 and paused == self._states.UNPAUSED))

    def _needs_return(self) -> bool:
        """Return True if somebody waits for steps, for a deferred message, or for the end of all requests."""
        return self.has_work() or bool(self._deferred) or bool(getattr(self.engine, "_idle_state_callbacks", ()))

    def _say_work(self) -> None:
        """Say whether there is work for the devices. An engine that is away has none."""
        self.turns.work(has=not self.away and self.has_work())

    def _held(self) -> bool:
        """Return whether the next step has to wait for others. One that only takes results, or drains, does not."""
        if isinstance(self.boundary, LoopBoundary) and not self.engine.is_running():
            return False  # it ends, and has little time to finish its requests
        return not self._closing and not self.turns.free and self.has_work() and self.turns.held()

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
        """Make a step, or none while the engine is away or held. In the caller's process, wait for it to end first."""
        nothing: tuple[dict[int, Any], bool] = ({}, False)
        while True:
            with self.boundary.entered():
                if self._outputs and not self._closing:
                    return self._outputs.popleft(), False
                away = self.away
                if not away and not self._held():
                    return self._make(stock)
                if not away and self.engine.batch_queue:
                    return self._drain(stock)
                self._check()
                if isinstance(self.boundary, LoopBoundary):
                    if not self.engine.is_running():
                        self.boundary.linger(_LINGER_S)
                    return nothing
                if away and not self.has_work():
                    return nothing
            if away:
                self._agent.ensure_resident()
            else:
                self.turns.wait()

    def _make(self, stock: Callable[[], Any]) -> Any:
        try:
            return stock()
        finally:
            self.turns.left(len(self.engine.batch_queue or ()))
            if not self._draining:
                self._say_work()

    def _drain(self, stock: Callable[[], Any]) -> Any:
        """Take the result of a batch in flight, and schedule none."""
        scheduler = self.engine.scheduler
        self._before = scheduler.pause_state
        scheduler.set_pause_state(self._states.PAUSED_ALL)
        self._draining = True
        try:
            return self._make(stock)
        finally:
            scheduler.set_pause_state(self._before)
            self._draining = False
            self._say_work()

    def changing(self, stock: Callable[[], Any]) -> Any:
        """Add or abort requests."""
        with self.boundary.entered():
            result = stock()
            if self.away or not self.turns.free:
                self._changed()
            if self.away:
                if self._needs_return():
                    self._agent.wanted()
                else:
                    self._agent.unwanted()
            self._say_work()
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
            self._say_work()  # it may have paused the engine

    def resident(self, stock: Callable[[], Any]) -> Any:
        """Call a method that needs the devices, after the engine's return."""
        while True:
            with self.boundary.entered():
                if not self.away:
                    result = stock()
                    self._say_work()  # it may have paused the engine
                    return result
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
            works = stock()
            self._loop_waits = works and self._waits()
            return works and not self._loop_waits
        return self._failed is not None or (not self.engine.is_running() and self.has_work())

    def _waits(self) -> bool:
        """Return whether the loop itself asks for work, and should wait for messages: the engine is held."""
        engine = self.engine
        asks = isinstance(self.boundary, LoopBoundary) and self.boundary.idle and engine.is_running()
        return asks and not engine.batch_queue and self._held()

    def idle(self, stock: Callable[[], None]) -> None:
        """Let the loop say that it is idle, to those that wait for the end of all requests."""
        if not self.away and not self._loop_waits:
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
