"""Step boundaries of an engine: another thread's function runs at one, at most once, or is refused."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shared_store.base.errors import DeclinedError

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def boundaries() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own imports warn about deprecations in torch
        import vllm.v1.engine

        from wooly_vllm.residency import boundary

    assert vllm.v1.engine
    return boundary


class Loop:
    """A loop as the engine core's: takes messages, and makes steps while it has work."""

    def __init__(self, boundaries: Any) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.ready = threading.Event()
        self.steps: list[str] = []
        self._thread = threading.Thread(target=self._run, args=(boundaries,))
        self._thread.start()
        assert self.ready.wait(60)

    def _run(self, boundaries: Any) -> None:
        self.boundary = boundaries.LoopBoundary(self)
        self.ready.set()
        while (message := self.input_queue.get()) != "end":
            with self.boundary.entered():
                if callable(message):
                    message()
                self.steps.append(threading.current_thread().name)

    def end(self) -> None:
        self.boundary.close()
        self.input_queue.put("end")
        self._thread.join()


@pytest.fixture
def loop(boundaries: Any) -> Iterator[Loop]:
    made = Loop(boundaries)
    yield made
    made.end()


def in_a_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start a thread; return it, and a list for the result or the error."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_a_posted_function_wakes_the_loop_and_runs_in_its_thread(loop: Loop) -> None:
    assert loop.boundary.run(lambda: threading.current_thread().name) == loop._thread.name


def test_an_error_of_a_posted_function_reaches_the_caller_and_not_the_loop(loop: Loop) -> None:
    with pytest.raises(ZeroDivisionError):
        loop.boundary.run(lambda: 1 // 0)
    assert loop.boundary.run(lambda: "goes on") == "goes on"


def test_a_function_that_is_late_is_refused_and_never_runs(loop: Loop) -> None:
    step, going = threading.Event(), threading.Event()
    loop.input_queue.put(lambda: (going.set(), step.wait()))
    going.wait()
    ran: list[int] = []
    with pytest.raises(DeclinedError, match=r"no step boundary in 0\.1 s"):
        loop.boundary.run(lambda: ran.append(1), within_s=0.05)
    step.set()
    assert loop.boundary.run(lambda: list(ran)) == []


def test_a_posted_function_that_makes_steps_does_not_run_others_in_between(loop: Loop) -> None:
    inner: list[str] = []

    def outer() -> None:
        other, _ = in_a_thread(lambda: loop.boundary.run(lambda: inner.append("other")))
        threads.append(other)
        while not loop.boundary._posted:
            pass
        with loop.boundary.entered():
            inner.append("step")

    threads: list[threading.Thread] = []
    loop.boundary.run(outer)
    threads[0].join()
    assert inner == ["step", "other"]


def test_a_method_that_a_step_calls_runs_no_posted_function(loop: Loop) -> None:
    order: list[str] = []
    step, going = threading.Event(), threading.Event()

    def make_step() -> None:
        going.set()
        step.wait()
        with loop.boundary.entered():  # as a step aborts requests, before it takes up its output
            order.append("abort")
        order.append("output")

    loop.input_queue.put(make_step)
    going.wait()
    thread, _ = in_a_thread(lambda: loop.boundary.run(lambda: order.append("posted")))
    while not loop.boundary._posted:
        pass
    step.set()
    thread.join()
    assert order == ["abort", "output", "posted"]


def test_waiting_in_the_loop_runs_posted_functions(loop: Loop) -> None:
    open_again = threading.Event()
    loop.input_queue.put(lambda: loop.boundary.wait(open_again.is_set))
    loop.boundary.run(open_again.set)
    assert loop.boundary.run(lambda: "goes on") == "goes on"


def test_functions_that_wait_are_refused_when_the_engine_ends(loop: Loop) -> None:
    step, going = threading.Event(), threading.Event()
    loop.input_queue.put(lambda: (going.set(), step.wait()))
    going.wait()
    thread, results = in_a_thread(lambda: loop.boundary.run(lambda: "ran"))
    while not loop.boundary._posted:
        pass
    loop.boundary.close()
    thread.join()
    step.set()
    assert isinstance(results[0], DeclinedError)
    with pytest.raises(DeclinedError):
        loop.boundary.run(lambda: "ran")


def test_in_the_callers_process_a_function_excludes_calls_of_the_engine(boundaries: Any) -> None:
    boundary = boundaries.CallersBoundary()
    with boundary.entered(), boundary.calling():
        thread, results = in_a_thread(lambda: boundary.run(lambda: "ran", within_s=0.05))
        thread.join()
        assert isinstance(results[0], DeclinedError)
    assert boundary.run(lambda: "ran") == "ran"
    boundary.close()
    with pytest.raises(DeclinedError):
        boundary.run(lambda: "ran")
