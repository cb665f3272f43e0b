"""The gate of a transformers process: threads that use models, and a mover that closes it between their steps."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch
from support.waiting import wait_until

from shared_store.activity.writer import ActivityWriter
from shared_store.base.errors import DeclinedError, OutOfMemoryError
from wooly_hf.workload.gate import Gate
from wooly_hf.workload.turns import Turns


class Activity(ActivityWriter):
    """Keeps the last numbers."""

    def end(self, running, waiting):
        super().end(running, waiting)
        self.now = running, waiting


class Models:
    """Models behind a gate: whoever waits for them waits until `back`."""

    def __init__(self):
        self.activity = Activity()
        self.back = threading.Event()
        self.error = None
        self.turns = Turns(self.changed, torch.device("cpu"))
        self.gate = Gate(self.come_back, self.activity, self.turns)

    def changed(self):
        self.gate.changed()

    def come_back(self):
        assert self.back.wait(30)
        if self.error is not None:
            raise self.error

    def open(self):
        self.gate.open()
        self.back.set()


@pytest.fixture
def models():
    return Models()


@pytest.fixture
def run():
    """Return a function that runs another in a thread; raise its errors after the test."""
    threads, errors = [], []

    def begin(function):
        def run():
            try:
                function()
            except BaseException as error:  # noqa: BLE001 - raised after the test
                errors.append(error)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        return threads[-1]

    yield begin
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_an_idle_leave_is_declined_while_a_thread_is_inside(models):
    with models.gate.using(), pytest.raises(DeclinedError, match="in use"):
        models.gate.close(active=False, within_s=0)
    assert not models.gate.closed
    models.gate.close(active=False, within_s=0)
    assert models.gate.closed


def test_a_thread_waits_at_the_closed_gate(models, run):
    """The activity shows it as waiting, then as running, then as gone."""
    models.gate.close(active=False, within_s=0)
    inside, leave = threading.Event(), threading.Event()

    def use():
        with models.gate.using():
            inside.set()
            assert leave.wait(30)

    thread = run(use)
    wait_until(lambda: models.activity.now == (0, 1), "it waits")
    assert not inside.is_set()
    models.open()
    assert inside.wait(30)
    assert models.activity.now == (1, 0)
    leave.set()
    thread.join(30)
    assert models.activity.now == (0, 0)


def test_an_active_leave_waits_for_the_next_boundary(models, run):
    """A thread that is inside goes on until it enters again; the gate is closed with it at the boundary."""
    began, step_ended, steps = threading.Event(), threading.Event(), []

    def generate():
        with models.gate.using():
            began.set()
            assert step_ended.wait(30)
            steps.append("before")
            with models.gate.using():
                steps.append("after")

    run(generate)
    assert began.wait(30)
    closed = threading.Event()

    def close():
        models.gate.close(active=True, within_s=30)
        closed.set()

    run(close)
    wait_until(lambda: models.gate.closed, "it closes")
    assert not closed.is_set()
    step_ended.set()
    assert closed.wait(30)
    assert steps == ["before"]
    assert models.gate.in_use
    models.open()
    wait_until(lambda: steps == ["before", "after"], "it goes on")


def test_an_active_leave_is_declined_when_the_time_is_over(models):
    with models.gate.using(), pytest.raises(DeclinedError, match=r"did not begin another forward pass .* \(1 of"):
        models.gate.close(active=True, within_s=0.05)
    assert not models.gate.closed


def test_a_thread_that_cannot_have_the_models_is_not_inside(models):
    """Also not in the boundary that failed; it stays in the outer one."""
    models.back.set()
    models.error = OutOfMemoryError("full")
    with models.gate.using():
        models.gate.closed = True
        with pytest.raises(OutOfMemoryError), models.gate.using():
            raise AssertionError
        models.gate.open()
        with pytest.raises(DeclinedError):
            models.gate.close(active=False, within_s=0)
    models.gate.close(active=False, within_s=0)


def test_leaving_what_was_not_entered_does_nothing(models):
    models.gate.enter("one")
    models.gate.leave("two")
    assert models.gate.in_use
    models.gate.leave("one")
    models.gate.leave("one")
    assert not models.gate.in_use


def test_an_entry_whose_frame_has_ended_counts_no_more(models):
    """As when Ctrl-C ends a call of a model without its last hook; also if another thread looks."""

    def interrupted():
        models.gate.enter("call", sys._getframe())
        assert models.gate.in_use

    interrupted()
    assert models.activity.now == (1, 0)
    thread = threading.Thread(target=models.gate.look)
    thread.start()
    thread.join()
    assert models.activity.now == (0, 0)
    interrupted()
    models.gate.close(active=False, within_s=0)


def test_an_entry_of_a_running_frame_counts(models):
    models.gate.enter("call", sys._getframe())
    found = []
    thread = threading.Thread(target=lambda: found.append(models.gate.in_use))
    thread.start()
    thread.join()
    assert found == [True]
    models.gate.leave("call")


def test_the_gate_is_not_closed_in_a_passing_block(models, run):
    with models.gate.passing():
        run(lambda: models.gate.close(active=True, within_s=0))
        time.sleep(0.05)  # it would have closed
        assert not models.gate.closed
    wait_until(lambda: models.gate.closed, "it closes")
    passed = []

    def passing():
        with models.gate.passing():
            passed.append(models.gate.closed)

    run(passing)
    wait_until(lambda: models.activity.now == (0, 1), "it waits")
    models.open()
    wait_until(lambda: passed == [False], "it passes")


def test_no_step_runs_while_the_models_are_away(models, run):
    """Threads that generate, call and pass, while the gate is closed and opened as fast as possible."""
    away, end = threading.Event(), threading.Event()
    returned = threading.Condition()

    def come_back():
        with returned:
            assert returned.wait_for(lambda: not models.gate.closed, 30)

    models.gate._come_back = come_back
    steps = [0] * 4

    def generate(number):
        while not end.is_set():
            with models.gate.using():
                for _ in range(3):
                    with models.gate.using():
                        assert not away.is_set()
                        time.sleep(0)
                        assert not away.is_set()
                        steps[number] += 1
                    time.sleep(0)

    def passing():
        while not end.is_set():
            with models.gate.passing():
                assert not away.is_set()
                steps[3] += 1
            time.sleep(0)

    for number in range(3):
        run(lambda number=number: generate(number))
    run(passing)
    moves = 0
    until = time.monotonic() + 2
    while time.monotonic() < until:
        try:
            models.gate.close(active=moves % 3 > 0, within_s=5)
        except DeclinedError:
            moves += 1
            continue
        away.set()
        time.sleep(0.001)
        away.clear()
        before = sum(steps)
        with returned:
            models.gate.open()
            returned.notify_all()
        moves += 1
        wait_until(lambda before=before: sum(steps) > before + 3, "threads go on")
    end.set()
    assert moves > 3
    assert min(steps) > 0
