"""Engine cores as workloads: hooks where an engine starts, where it takes requests and makes steps, and where it ends.

Relies on ``Executor.__init__`` being called once for each engine core, before its workers exist, and after vLLM has
loaded its plugins in the engine core's process; and on the names in :func:`install`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from shared_store.base.errors import ConfigError
from wooly_vllm import compat
from wooly_vllm.residency.gate import Gate
from wooly_vllm.residency.workload import EngineWorkload, ListedEngine
from wooly_vllm.sharing_loader import sharing_loader

_WORKLOAD = "_wooly_workload"
"""Attribute of an executor, and of its engine core once it has started."""

_LISTED = "_wooly_listed"
"""Attribute of an engine core that does not share its weights."""


def install() -> None:
    """Make engines of this process workloads. Idempotent.

    Raises:
        ConfigError: this vLLM does not have a name that is needed. Nothing is changed.
    """
    core, proc, rank = compat.find("vllm.v1.engine.core", "EngineCore", "EngineCoreProc", "DPEngineCoreProc")
    (executor,) = compat.find("vllm.v1.executor.abstract", "Executor")
    compat.find("vllm.v1.core.sched.interface", "PauseState")
    if getattr(executor.__init__, "wooly", False):
        return
    wrappers: list[tuple[type, str, Callable[[Any], Any]]] = [
        (executor, "__init__", _starting),
        (core, "__init__", _started),
        (core, "shutdown", _ending),
        (core, "sleep", _sleeping),
        (core, "wake_up", _waking),
        (core, "is_scheduler_paused", _through(Gate.paused)),
        *((core, name, _through(Gate.step)) for name in ("step", "step_with_batch_queue")),
        *((core, name, _through(Gate.changing)) for name in ("add_request", "abort_requests", "reset_prefix_cache")),
        *((core, name, _through(Gate.resident)) for name in ("pause_scheduler", "resume_scheduler")),
        *((kind, "run_busy_loop", _looping) for kind in (proc, rank)),
        (proc, "has_work", _through(Gate.loop_has_work)),
        (proc, "_notify_idle_state_callbacks", _through(Gate.idle)),
        (proc, "_handle_client_request", _messaged),
    ]
    missing = [f"{owner.__name__}.{name}" for owner, name, _ in wrappers if not hasattr(owner, name)]
    missing += [f"EngineCoreProc.{name}" for name in ("is_running", "_process_engine_step") if not hasattr(proc, name)]
    if missing:
        raise compat.moved(missing[0], AttributeError(missing[0]))
    for owner, name, wrap in wrappers:
        setattr(owner, name, wrap(getattr(owner, name)))
    executor.__init__.wooly = True


def workload_of(engine: Any) -> EngineWorkload | None:
    """Return the workload of an engine core that has started; None if it is none."""
    found: EngineWorkload | None = vars(engine).get(_WORKLOAD)
    return found


def _gate_of(engine: Any) -> Gate | None:
    workload = workload_of(engine)
    return None if workload is None else workload.gate


def _starting(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``Executor.__init__``, which makes the workers and loads the model."""

    @functools.wraps(stock)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        workload = _workload(vllm_config)
        if workload is None:
            stock(self, vllm_config, *args, **kwargs)
            return
        try:
            workload.take_room()
            with workload.members():
                stock(self, vllm_config, *args, **kwargs)
        except BaseException:
            workload.close()
            raise
        setattr(self, _WORKLOAD, workload)

    return init


def _workload(vllm_config: Any) -> EngineWorkload | None:
    try:
        loader = sharing_loader(vllm_config)
    except (ConfigError, ValueError):
        return None  # vLLM makes the loader again, and raises
    if loader is None:
        return None
    try:
        return EngineWorkload(vllm_config, loader)
    except (AttributeError, NotImplementedError, OSError, RuntimeError, ValueError) as error:  # its devices are unknown
        compat.logger().warning("wooly: this engine is no workload, and never swapped out: %r", error)
        return None


def _started(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``EngineCore.__init__``. Where plugins are loaded by it, :func:`_looping` does the same later."""

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            stock(self, *args, **kwargs)
            if not hasattr(self, "input_queue"):
                _start(self)
        except BaseException:
            workload = getattr(getattr(self, "model_executor", None), _WORKLOAD, None)
            if workload is not None:
                workload.close()
            raise

    return init


def _looping(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineCoreProc.run_busy_loop``."""

    @functools.wraps(stock)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        _start(self)
        return stock(self, *args, **kwargs)

    return run


def _start(engine: Any) -> None:
    workload: EngineWorkload | None = getattr(engine.model_executor, _WORKLOAD, None)
    if workload is None and not hasattr(engine, _LISTED) and sharing_loader(engine.vllm_config) is None:
        listed = ListedEngine(engine.vllm_config)
        setattr(engine, _LISTED, listed)
        weakref.finalize(engine, listed.close).atexit = False
    elif workload is not None and workload_of(engine) is None:
        setattr(engine, _WORKLOAD, workload)
        weakref.finalize(engine, workload.close).atexit = False
        if hasattr(engine, "input_queue"):
            workload.is_all_of_this_process()
        workload.started(engine)
        if hasattr(engine, "input_queue"):
            workload.offer_checkpoints()


def _ending(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``EngineCore.shutdown``."""

    @functools.wraps(stock)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        for joined in (workload_of(self), vars(self).get(_LISTED)):
            if joined is not None:
                joined.close()
        stock(self, *args, **kwargs)

    return shutdown


def _through(pass_gate: Callable[[Gate, Callable[[], Any]], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper of methods of an engine core, which go through its gate."""

    def wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            gate = _gate_of(self)
            if gate is None:
                return stock(self, *args, **kwargs)
            return pass_gate(gate, lambda: stock(self, *args, **kwargs))

        return method

    return wrap


def _messaged(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``EngineCoreProc._handle_client_request``."""
    (kind,) = compat.find("vllm.v1.engine", "EngineCoreRequestType")

    @functools.wraps(stock)
    def handle(self: Any, request_type: Any, request: Any) -> None:
        gate = _gate_of(self)
        if gate is None:
            stock(self, request_type, request)
            return
        utility = str(request[2]) if request_type == kind.UTILITY else ""
        gate.message(lambda: stock(self, request_type, request), (request_type, request), utility)

    return handle


def _sleeping(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineCore.sleep``: an engine that its user puts to sleep stays away until it is woken up."""

    @functools.wraps(stock)
    def sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        workload = workload_of(self)
        if workload is None or not self.vllm_config.model_config.enable_sleep_mode:
            return stock(self, *args, **kwargs)
        call = functools.partial(stock, self, *args, **kwargs)
        result = call() if workload.gate is None else workload.gate.resident(call)

        def asleep(_: object = None) -> None:
            if self.model_executor.is_sleeping:
                workload.fell_asleep()

        if isinstance(result, Future):
            result.add_done_callback(asleep)
        else:
            asleep()
        return result

    return sleep


def _waking(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineCore.wake_up``: it takes memory first, and fails with the engine still asleep if there is none."""

    @functools.wraps(stock)
    def wake_up(self: Any, tags: list[str] | None = None) -> Any:
        workload = workload_of(self)
        if workload is None or not self.vllm_config.model_config.enable_sleep_mode:
            return stock(self, tags)
        if not self.model_executor.is_sleeping:
            return stock(self, tags)
        if tags is not None and set(tags) <= {"scheduling"}:
            return stock(self, tags)

        def wake() -> Any:
            try:
                result = stock(self, tags)
            except BaseException:
                workload.fell_asleep()
                raise
            if not self.model_executor.is_sleeping:
                workload.woke_up()
            return result

        if not hasattr(self, "input_queue") or workload.gate is None:
            workload.take_room_to_wake()
            return wake()
        return _in_the_background(workload.take_room_to_wake, functools.partial(workload.gate.boundary.run, wake))

    return wake_up


def _in_the_background(*steps: Callable[[], Any]) -> Future[Any]:
    """Take steps one after the other in a thread, so that the loop goes on; return the last one's result."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            results = [step() for step in steps]
        except BaseException as error:  # noqa: BLE001 - raised by the future
            future.set_exception(error)
        else:
            future.set_result(results[-1])

    threading.Thread(target=run, name="wooly-wake", daemon=True).start()
    return future
