"""Steps of a transformers process, with a test in the arbiter's place: threads, training, and departures while held."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
import torch
from hf.test_gate import Models, run
from support.turning import Arbiter
from support.waiting import wait_until
from torch.utils.checkpoint import checkpoint

from shared_store.base.errors import DeclinedError
from shared_store.compute import layout
from wooly_hf.workload import backward, ranks
from wooly_hf.workload.gate import Use

__all__ = ["run"]


@pytest.fixture
def models():
    made = Models()
    made.turns.start()
    yield made
    made.turns.close()


@pytest.fixture
def arbiter(models):
    made = Arbiter(models.turns.gate)
    yield made
    made.close()
    wait_until(lambda: not models.turns.gate.attached, "the gate to be free")


def hold(arbiter):
    arbiter.words[layout.UNTIL_WORD] = 0


def release(arbiter):
    arbiter.words[layout.UNTIL_WORD] = layout.FREE
    arbiter.ring()


def counts(arbiter):
    return arbiter.words[layout.BEGUN_WORD], arbiter.words[layout.ENDED_WORD]


def test_a_call_is_a_step_and_calls_inside_are_not(models, arbiter):
    with models.gate.using(Use.STEP):
        assert arbiter.working
        assert arbiter.in_flight == 1
        assert models.gate.stepping
        hold(arbiter)
        with models.gate.using(Use.STEP), models.gate.using(Use.WORK):
            assert counts(arbiter) == (1, 0)
        release(arbiter)
        assert arbiter.in_flight == 1
    assert counts(arbiter) == (1, 1)
    assert not models.gate.stepping


def test_work_lasts_for_a_generation_and_ends_after_it(models, arbiter):
    with models.gate.using(Use.WORK):
        for step in range(3):
            assert arbiter.in_flight == 0
            with models.gate.using(Use.STEP):
                assert arbiter.working
            assert counts(arbiter) == (step + 1, step + 1)
        assert arbiter.working
    arbiter.wait_for(lambda: not arbiter.working)


def test_saving_weights_is_no_work(models, arbiter):
    with models.gate.using():
        assert not arbiter.working
        hold(arbiter)
        with models.gate.using():
            assert models.activity.now == (1, 0)
        release(arbiter)
    assert counts(arbiter) == (0, 0)


def test_a_thread_waits_until_its_step_may_begin(models, arbiter, run):
    hold(arbiter)
    passed = []

    def generate():
        with models.gate.using(Use.WORK):
            for _ in range(2):
                with models.gate.using(Use.STEP):
                    passed.append(counts(arbiter))

    thread = run(generate)
    arbiter.wait_for(lambda: arbiter.waits)
    wait_until(lambda: models.activity.now == (0, 1), "the activity to show that it waits")
    assert arbiter.working
    assert not passed
    release(arbiter)
    thread.join(30)
    assert passed == [(1, 0), (2, 1)]
    assert arbiter.words[layout.HELD_WORD]
    assert not arbiter.words[layout.HELD_SINCE_WORD]


def test_a_step_that_is_forced_is_one_step_of_one_thread(models, arbiter, run):
    hold(arbiter)
    made = []

    def generate():
        with models.gate.using(Use.WORK), models.gate.using(Use.STEP):
            made.append(1)

    threads = [run(generate) for _ in range(3)]
    wait_until(lambda: models.activity.now == (0, 3), "all to wait")
    for number in range(1, 4):
        arbiter.words[layout.ALLOWED_WORD] = number
        arbiter.ring()
        wait_until(lambda number=number: counts(arbiter) == (number, number), "one step")
        wait_until(lambda number=number: models.activity.now == (0, 3 - number), "the others to wait")
    for thread in threads:
        thread.join(30)
    assert len(made) == 3


def test_threads_are_counted_together(models, arbiter, run):
    inside, leave = threading.Barrier(3), threading.Event()

    def call():
        with models.gate.using(Use.STEP):
            inside.wait(30)
            assert leave.wait(30)

    threads = [run(call) for _ in range(2)]
    inside.wait(30)
    assert arbiter.in_flight == 2
    leave.set()
    for thread in threads:
        thread.join(30)
    assert arbiter.in_flight == 0
    assert counts(arbiter) == (2, 2)
    arbiter.wait_for(lambda: not arbiter.working)


def test_the_models_leave_while_a_thread_is_held(models, arbiter, run):
    """It then waits for both: the models, and its turn."""
    hold(arbiter)
    made = []

    def call():
        with models.gate.using(Use.STEP):
            made.append(1)

    thread = run(call)
    arbiter.wait_for(lambda: arbiter.waits)
    with models.gate.using(), pytest.raises(DeclinedError, match="did not begin"):
        models.gate.close(active=True, within_s=0.01)
    models.gate.close(active=True, within_s=30)
    release(arbiter)
    arbiter.wait_for(lambda: not arbiter.working)
    assert not made
    models.open()
    thread.join(30)
    assert made


def test_an_interrupted_wait_is_no_step(models, arbiter, run):
    """As by Ctrl-C: the entry ends, and so does the work."""
    hold(arbiter)
    ended = []

    class CtrlCError(BaseException):
        pass

    def call():
        def interrupted():
            raise CtrlCError

        models.turns.may_begin = interrupted
        try:
            with models.gate.using(Use.STEP):
                raise AssertionError
        except CtrlCError:
            ended.append(1)
        finally:
            del models.turns.may_begin

    run(call).join(30)
    assert ended
    assert counts(arbiter) == (0, 0)
    assert not models.gate.in_use
    arbiter.wait_for(lambda: not arbiter.working)


def test_a_call_that_was_interrupted_ends_its_step(models, arbiter):
    def interrupted():
        models.gate.enter("call", sys._getframe(), Use.STEP)
        assert arbiter.in_flight == 1

    interrupted()
    models.gate.look()
    assert arbiter.in_flight == 0
    assert counts(arbiter) == (1, 1)


def test_an_arbiter_that_ends_frees_threads(models, run):
    arbiter = Arbiter(models.turns.gate)
    hold(arbiter)
    made = []

    def call():
        with models.gate.using(Use.STEP):
            made.append(1)

    thread = run(call)
    arbiter.wait_for(lambda: arbiter.waits)
    arbiter.close()
    thread.join(30)
    assert made


def test_a_backward_pass_is_a_step_that_is_not_held(models, arbiter):
    weight = torch.ones(3, requires_grad=True)
    seen = []
    with models.gate.using(Use.STEP):
        output = {"logits": weight * 2, "other": (weight.detach(),)}
    weight.register_hook(lambda _grad: seen.append((arbiter.in_flight, counts(arbiter))))
    backward.watch(output, models.turns)
    hold(arbiter)
    for number in (1, 2):
        output["logits"].sum().backward(retain_graph=True)
        assert seen[-1] == (1, (1 + number, number))
        assert counts(arbiter) == (1 + number, 1 + number)
    assert arbiter.in_flight == 0
    release(arbiter)


def test_a_backward_pass_that_fails_ends_with_its_graph(models, arbiter):
    weight = torch.ones(3, requires_grad=True)

    def fail(_grads):
        raise RuntimeError("of a test")

    output = weight * 2
    output.grad_fn.next_functions[0][0].register_prehook(fail)
    backward.watch(output, models.turns)
    with pytest.raises(RuntimeError, match="of a test"):
        output.sum().backward()
    assert arbiter.in_flight == 1
    del output
    gc.collect()
    models.gate.look()
    assert arbiter.in_flight == 0


def test_a_backward_pass_that_failed_ends_when_its_thread_calls_again(models, arbiter):
    """The program still has the output, and with it the graph."""
    weight = torch.ones(3, requires_grad=True)

    def fail(_grads):
        raise RuntimeError("of a test")

    with models.gate.using(Use.STEP):
        output = weight * 2
    output.grad_fn.next_functions[0][0].register_prehook(fail)
    backward.watch(output, models.turns)
    with pytest.raises(RuntimeError, match="of a test"):
        output.sum().backward()
    assert arbiter.in_flight == 1
    with models.gate.using(Use.STEP):
        assert arbiter.in_flight == 1
    assert counts(arbiter) == (3, 3)
    del output


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_backward_pass_that_calls_the_model_again_is_not_held(models, arbiter, run, use_reentrant):
    """Checkpointing of the whole model calls it in the backward pass."""
    called = []

    def call(given):
        with models.gate.using(Use.STEP):
            called.append(arbiter.in_flight)
            return torch.tanh(given)

    given = torch.ones(3, requires_grad=True)
    output = checkpoint(call, given, use_reentrant=use_reentrant)
    backward.watch(output, models.turns)
    hold(arbiter)
    thread = run(output.sum().backward)
    thread.join(30)
    assert not thread.is_alive()
    assert len(called) == 2
    assert arbiter.in_flight == 0
    assert given.grad is not None
    release(arbiter)


def test_a_graph_that_is_dropped_without_a_backward_pass_counts_for_nothing(models, arbiter):
    weight = torch.ones(3, requires_grad=True)
    output = weight * 2
    backward.watch(output, models.turns)
    del output
    gc.collect()
    models.gate.look()
    assert counts(arbiter) == (0, 0)


def test_many_threads_are_held_and_released(models, arbiter, run):
    """No step runs while the arbiter holds, and none is lost."""
    end = threading.Event()
    made = [0] * 3

    def generate(number):
        while not end.is_set():
            with models.gate.using(Use.WORK):
                for _ in range(3):
                    with models.gate.using(Use.STEP):
                        made[number] += 1

    for number in range(3):
        run(lambda number=number: generate(number))
    for _ in range(50):
        hold(arbiter)
        arbiter.wait_for(lambda: arbiter.waits)
        wait_until(lambda: models.activity.now == (0, 3), "all to wait")
        before = list(made)
        assert counts(arbiter)[0] == sum(made)
        assert made == before
        release(arbiter)
        wait_until(lambda before=before: sum(made) > sum(before), "steps")
    end.set()
    release(arbiter)


@pytest.mark.parametrize("name", ranks.SIZES)
def test_ranks_are_known_by_their_launcher(monkeypatch, name):
    for other in ranks.SIZES:
        monkeypatch.delenv(other, raising=False)
    assert ranks.reason() == ""
    for size in ("1", "", "many"):
        monkeypatch.setenv(name, size)
        assert ranks.reason() == ""
    monkeypatch.setenv(name, "2")
    assert "one of 2 ranks" in ranks.reason()
