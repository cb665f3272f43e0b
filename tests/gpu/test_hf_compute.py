"""transformers processes on one GPU take turns: a less important one is held, and a step ends when it was computed."""

from __future__ import annotations

import pytest
from hf.jobs import Job
from support.models import large_llama
from support.stores import store_without_catalog
from support.waiting import wait_until

from shared_store.client.session import Session
from shared_store.compute import support

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]

WITHIN_S = 60.0
BEGINNING = """
import threading, time
from wooly_hf.workload import process
my_ids = torch.arange(3, 40, device="cuda")[None]
def gate():
    return process.current().turns.gate
def tokens_of(model):
    return model.generate(my_ids, max_new_tokens=40, min_new_tokens=40, do_sample=False).tolist()
def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)
my_model = load(path, "wooly:cuda:0", wooly_workload=name, wooly_priority=priority)
my_tokens = tokens_of(my_model)
"""
GENERATE_ON = """
my_end = threading.Event()
def my_generate():
    while not my_end.is_set():
        tokens_of(my_model)
my_thread = threading.Thread(target=my_generate, daemon=True)
my_thread.start()
"""


@pytest.fixture(scope="module")
def store(gpu, gpu_of_torch):
    assert gpu_of_torch == gpu
    for name in ("transformers", "accelerate"):
        pytest.importorskip(name)
    if not support.GPUS:
        pytest.skip(support.UNGATED)
    yield from store_without_catalog()


@pytest.fixture(scope="module")
def pair(store, tmp_path_factory):
    """Return a P0 and a P3 process with one model."""
    folder = tmp_path_factory.mktemp("jobs")
    large_llama.run("make", str(folder / "model"), "--layers", "1", "--vocabulary", "320")
    made = []
    for name, priority in (("important", 0), ("job", 3)):
        made.append(Job(store.directory, folder / name))
        made[-1].run(BEGINNING, path=folder / "model", name=name, priority=priority)
    yield made
    for one in made:
        one.kill()


@pytest.fixture
def compute(store):
    """Return a function that tells what a workload computes, by its name."""
    with Session.connect(store.directory, autostart=False, name="test") as session:
        yield lambda name: next(it.compute for it in session.status().workloads if it.name == name)


def test_a_generation_is_held_and_goes_on(pair, compute):
    important, job = pair
    important.run(GENERATE_ON)
    job.run("wait_for(lambda: not gate().may_begin())")
    job.begin("result = tokens_of(my_model) == my_tokens")
    wait_until(lambda: compute("job").held, "it is held", WITHIN_S)
    assert not job.answered()
    assert not compute("important").held
    important.run("my_end.set(); my_thread.join(60)")
    assert job.finish() is True
    assert compute("important").device_s > 0


def test_a_step_ends_when_the_device_has_computed_it(pair):
    """While others share the device; the call enqueues much more than it waits for."""
    important, _ = pair
    code = """
    my_big = torch.randn(8192, 8192, device="cuda")
    def enqueue(*_):
        for _ in range(40):
            torch.matmul(my_big, my_big)
    hook = my_model.model.layers[0].register_forward_hook(enqueue)
    wait_for(lambda: gate().contended)
    with torch.no_grad():
        my_model(my_ids)
    result = torch.cuda.current_stream().query()
    hook.remove()
    """
    assert important.run(code) is True


def test_a_backward_pass_ends_when_the_device_has_computed_it(pair):
    important, _ = pair
    code = """
    from shared_store.compute import layout
    wait_for(lambda: gate().contended)
    def ended():
        return gate()._words[layout.ENDED_WORD]
    before = ended()
    my_inputs = my_model.get_input_embeddings()(my_ids).detach().requires_grad_()
    my_model(inputs_embeds=my_inputs).logits.sum().backward()
    result = [ended() - before, torch.cuda.current_stream().query(), my_inputs.grad is not None]
    """
    assert important.run(code) == [2, True, True]
