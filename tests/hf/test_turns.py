"""Transformers processes take turns on a device that is too small for all: killed, interrupted, and told why."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hf.jobs import Job, JobError
from hf.test_swaps import OBSERVE, PROMPT
from safetensors.torch import load_file, save_file
from support.mapped import segment_ranges
from support.stores import KeptStore, StoreProcess
from support.waiting import wait_until

from shared_store.client.session import Session

MIB = 1 << 20
BUDGET = 7 * MIB
"""For one of two models with about 4 MiB each."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def start_store():
    """Return a function that starts a store with the small budget, of a class with options."""
    running = []

    def start(kind=StoreProcess, **options):
        directory = Path(tempfile.mkdtemp(prefix="wooly-"))
        defaults = {"budget": {"cpu": BUDGET}, "vram_reserve": 0, "min_resident_s": 0.0, "turn_s": 0.2}
        running.append(kind(directory, redis_url=f"unix://{directory}/away", **{**defaults, **options}).start())
        return running[-1]

    yield start
    for one in running:
        one.clean_up()
        shutil.rmtree(one.directory)


@pytest.fixture(scope="module")
def paths(checkpoint, tmp_path_factory):
    """Return two models by name, without a common tensor."""
    found = {"one": checkpoint("llama-tied"), "two": tmp_path_factory.mktemp("models") / "qwen3"}
    shutil.copytree(checkpoint("qwen3"), found["two"])
    file = found["two"] / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return found


@pytest.fixture
def start(paths, tmp_path):
    """Return a function that starts a process with the model of its name, and one that has none."""
    made = []

    def begin(store, name, *, wait=True, arguments="", **environment):
        one = Job(store.directory, tmp_path / f"{name}.log", **environment)
        made.append(one)
        one.run(PROMPT + OBSERVE)
        load = f"my_model = load(path, wooly_workload='{name}'{arguments})\nmy_logits = logits_of(my_model)"
        (one.run if wait else one.begin)(load, path=paths[name])
        return one

    yield begin
    for one in made:
        one.kill()


CALL = "result = [logits_of(my_model) == my_logits, state()]"


def state(one):
    return one.run("result = state()")


def test_two_processes_take_turns(start_store, start):
    """The second starts in the memory of the first; each call returns its model, and the other leaves."""
    store = start_store()
    one = start(store, "one")
    assert state(one) == "resident"
    two = start(store, "two")
    for _ in range(3):
        assert (state(one), state(two)) == ("swapped", "resident")
        assert not segment_ranges(one.pid)
        assert one.run(CALL) == [True, "resident"]
        assert (state(one), state(two)) == ("resident", "swapped")
        assert not segment_ranges(two.pid)
        assert two.run(CALL) == [True, "resident"]


def test_both_stay_with_memory_for_both(start_store, start):
    """The control: with three times the budget nothing leaves."""
    store = start_store(budget={"cpu": 3 * BUDGET})
    one, two = start(store, "one"), start(store, "two")
    assert (state(one), state(two)) == ("resident", "resident")


GENERATE = """
import pathlib, time
class Wait(transformers.StoppingCriteria):
    def __init__(self, mark):
        self.mark = mark
    def __call__(self, ids, scores, **_):
        if self.mark and ids.shape[1] == 60:
            pathlib.Path(self.mark).touch()
            until = time.monotonic() + 60
            while not process.current().gate.closed and time.monotonic() < until:
                time.sleep(0.001)
        return torch.full((ids.shape[0],), False)
def generate(mark):
    return my_model.generate(my_ids, max_new_tokens=80, min_new_tokens=80, do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([Wait(mark)])).tolist()
"""


def test_a_generation_is_interrupted_for_a_higher_priority(start_store, start, tmp_path):
    """It stops before a forward pass and goes on later; its tokens are those of one that was not interrupted."""
    store = start_store()
    two = start(store, "two", arguments=", wooly_priority=0")
    one = start(store, "one", arguments=", wooly_priority=3")
    expected = one.run(GENERATE + "result = generate(None)")
    assert (state(one), state(two)) == ("resident", "swapped")
    one.begin("result = generate(mark)", mark=tmp_path / "mark")
    wait_until((tmp_path / "mark").exists, "it generates", timeout_s=60)
    with Session.connect(store.directory, autostart=False, name="test") as session:
        found = [it.activity for it in session.status().clients if it.pid == one.pid and it.activity]
    assert [(it.busy, it.running, it.waiting) for it in found] == [(True, 1, 0)]
    assert two.run(CALL) == [True, "resident"]
    assert one.finish() == expected
    assert (state(one), state(two)) == ("resident", "swapped")


def test_a_start_that_finds_no_memory_says_which_workload_has_it(start_store, start):
    """It fails after `WOOLY_START_TIMEOUT`, having loaded nothing; it works once the memory is free."""
    store = start_store()
    one = start(store, "one", arguments=", wooly_swap=False")
    with pytest.raises(JobError, match="no memory was free within 1 s") as raised:
        start(store, "two", WOOLY_START_TIMEOUT="1s")
    assert raised.value.name == "TimedOutError"
    assert "one" in raised.value.text
    one.run("del my_model; gc.collect()")
    two = start(store, "two", WOOLY_START_TIMEOUT="60s")
    assert two.run(CALL) == [True, "resident"]


BLOCK = """
import threading
from shared_store.sleep.sleeper import Sleeper
my_at = threading.Event()
def block(name):
    def blocked(self, *_):
        my_at.set()
        threading.Event().wait()
    setattr(Sleeper, name, blocked)
"""


@pytest.mark.parametrize("when", ["resident", "draining", "leaving", "swapped", "returning", "waiting"])
def test_a_process_that_is_killed_in_any_state(start_store, start, when):
    """The other gets the memory, and computes what it did."""
    store = start_store()
    one = start(store, "one", arguments=", wooly_priority=2")
    if when == "resident":
        one.kill()
        assert start(store, "two").run(CALL) == [True, "resident"]
        return
    if when in {"draining", "leaving"}:
        one.run(BLOCK + f"block({'prepare' if when == 'draining' else 'sleep'!r})")
        two = start(store, "two", wait=False, arguments=", wooly_priority=2")
        assert one.run("result = [my_at.wait(60), state()]") == [True, when]
        one.kill()
        two.finish()
        assert two.run(CALL) == [True, "resident"]
        return
    two = start(store, "two", arguments=", wooly_priority=2")
    assert (state(one), state(two)) == ("swapped", "resident")
    if when == "returning":
        one.run(BLOCK + "block('wake')")
        one.begin(CALL)
        wait_until(lambda: not segment_ranges(two.pid), "the other left")
    elif when == "waiting":
        two.run("torch.optim.SGD(my_model.parameters(), lr=0.1)")  # stays from here on
        one.begin(CALL)
    one.kill()
    assert two.run(CALL) == [True, "resident"]


def test_a_victim_that_is_killed_while_another_waits(start_store, start):
    """The one that waits for its memory gets it."""
    store = start_store()
    one, two = start(store, "one"), start(store, "two")
    two.run("torch.optim.SGD(my_model.parameters(), lr=0.1)")  # stays from here on
    one.begin(CALL)
    with Session.connect(store.directory, autostart=False, name="test") as session:
        wait_until(lambda: "two" in " ".join(session.workloads.explain("one").lines), "it waits")
    assert not one.answered()
    two.kill()
    assert one.finish() == [True, "resident"]


def test_the_store_is_killed_and_restarted(start_store, start):
    """A process that is away returns at the next store, which knows that it is away."""
    store = start_store(KeptStore)
    one, two = start(store, "one"), start(store, "two")
    before = store.kill_store()
    wait_until(lambda: store.store_pid != before, "another store")
    assert one.run(CALL) == [True, "resident"]
    assert two.run(CALL) == [True, "resident"]
    wait_until(lambda: state(one) == "swapped", "the first is away again")


def test_without_a_store_it_returns_by_itself(start_store, start):
    """From its host copy, into memory of its own."""
    store = start_store()
    one = start(store, "one")
    with Session.connect(store.directory, autostart=False, name="test") as session:
        session.workloads.move("one", out=True)
    os.kill(store.pid, signal.SIGKILL)
    store.wait()
    assert one.run(CALL) == [True, "resident"]


def test_memory_that_is_not_to_be_had_on_return_is_waited_for(start_store, start, paths):
    """All models of the process are rolled back; the call waits, and is answered later."""
    store = start_store(budget={"cpu": 3 * BUDGET})
    one = start(store, "one")
    one.run("my_second = load(path)\nmy_others = logits_of(my_second)", path=paths["two"])
    one.run(
        """
        from shared_store.base.errors import OutOfMemoryError
        from shared_store.sleep.sleeper import Sleeper
        wake, my_failures = Sleeper.wake, []
        def fails(self, *arguments):
            if len(my_failures) < 3 and "qwen3" in self._model.manifest.name:
                my_failures.append(1)
                raise OutOfMemoryError("of a test")
            return wake(self, *arguments)
        Sleeper.wake = fails
        """
    )
    with Session.connect(store.directory, autostart=False, name="test") as session:
        session.workloads.move("one", out=True)
    assert one.run("result = [logits_of(my_model) == my_logits, len(my_failures)]") == [True, 3]
    assert one.run("result = [logits_of(my_second) == my_others, state()]") == [True, "resident"]


def test_a_model_whose_bytes_are_wrong_is_an_error(start_store, start):
    """No call computes with them: each raises the error; the process stays away, and others go on."""
    store = start_store()
    one = start(store, "one")
    one.run(
        """
        from shared_store.base.errors import DigestMismatchError
        from shared_store.sleep.sleeper import Sleeper
        def fails(self, *_):
            raise DigestMismatchError("of a test")
        Sleeper.wake = fails
        """
    )
    two = start(store, "two")
    for _ in range(2):
        with pytest.raises(JobError) as raised:
            one.run(CALL)
        assert raised.value.name == "DigestMismatchError"
        assert two.run(CALL) == [True, "resident"]
