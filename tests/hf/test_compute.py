"""transformers processes take turns with other workloads: calls, generations, training, killed while they hold."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from hf.jobs import Job, JobError
from hf.stock_ways import quantize
from hf.test_swaps import OBSERVE, PROMPT
from support.stepping import Stepping
from support.stores import store_without_catalog
from support.waiting import wait_until

from shared_store.client.session import Session

GIB = 1 << 30
WITHIN_S = 60.0

STEPS = """
import pathlib, threading, time
from shared_store.compute import layout
def gate():
    return process.current().turns.gate
def begun():
    return gate()._words[layout.BEGUN_WORD]
def wait_until_held():
    until = time.monotonic() + 60
    while gate().may_begin():
        assert time.monotonic() < until
        time.sleep(0.001)
def reach(mark):
    if mark:
        pathlib.Path(mark).touch()
        wait_until_held()
class Streamer:
    def __init__(self, mark=None):
        self.tokens, self.mark = [], mark
    def put(self, tokens):
        self.tokens += tokens.reshape(-1).tolist()
        if len(self.tokens) == 45:
            reach(self.mark)
    def end(self):
        self.tokens.append("end")
def stream(mark=None):
    streamer = Streamer(mark)
    my_model.generate(my_ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, streamer=streamer)
    return streamer.tokens
"""


@pytest.fixture(scope="module")
def store():
    """Start a store with room for all."""
    yield from store_without_catalog(budget={"cpu": 8 * GIB}, vram_reserve=0, min_resident_s=0.0)


@pytest.fixture(scope="module")
def session(store):
    with Session.connect(store.directory, autostart=False, name="test") as connected:
        yield connected


@pytest.fixture
def compute(session):
    """Return a function that tells what a workload computes, by its name; None if it is not listed."""

    def found(name):
        return next((it.compute for it in session.status().workloads if it.name == name), None)

    return found


@pytest.fixture
def urgent(store):
    """Return a P0 workload that makes steps while it is asked to."""
    with Stepping(store.directory, "urgent") as made:
        wait_until(lambda: made.attached, "it has an arbiter")
        yield made


@pytest.fixture
def working(urgent, compute):
    """Return a context in which the P0 workload works, and a workload of a name, if there is one, is held."""

    @contextlib.contextmanager
    def during(name=""):
        with urgent.working():
            if name:
                wait_until(lambda: compute(name).held, f"{name} to be held", WITHIN_S)
            yield

    return during


def load(process, path, arguments):
    process.run(PROMPT + OBSERVE + STEPS + f"my_model = load(path, {arguments})\n", path=path)
    process.run("my_logits, my_tokens, my_stream = logits_of(my_model), tokens_of(my_model), stream()")


@pytest.fixture
def one(job, checkpoint):
    """Return a process with a model and what it computes, as a P3 workload named `job`."""
    one = job("one")
    load(one, checkpoint("llama-tied"), "wooly_workload='job', wooly_priority=3")
    yield one
    one.forget()


WAYS = {
    "a call": "result = logits_of(my_model) == my_logits",
    "generate": "result = tokens_of(my_model) == my_tokens",
    "streaming": "result = stream() == my_stream",
    "the base model": "with torch.no_grad(): result = my_model.model(my_ids).last_hidden_state.shape[1] == 37",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(3) as pool:
    result = all(pool.map(lambda _: tokens_of(my_model) == my_tokens, range(3)))
""",
    "an assistant": """
found = my_model.generate(my_ids, max_new_tokens=12, do_sample=False, assistant_model=my_assistant)
result = found.tolist() == my_tokens
""",
    "a wrapper": """
import peft
torch.manual_seed(3)
config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
result = logits_of(peft.get_peft_model(my_model, config)) == my_logits
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_held_for_a_more_important_workload(one, working, compute, checkpoint, way):
    """It makes no step meanwhile, and computes what it did."""
    one.run("my_assistant = load(path, wooly_priority=3); my_begun = begun()", path=checkpoint("llama-tied"))
    before = compute("job").held_s
    with working():
        one.run("wait_until_held()")
        one.begin(WAYS[way])
        wait_until(lambda: compute("job").held, "it is held", WITHIN_S)
        assert not one.answered()
    assert one.finish() is True
    assert one.run("result = begun() - my_begun") > 0
    wait_until(lambda: compute("job").held_s > before, "the time for which it was held")
    wait_until(lambda: not compute("job").held, "it is not held")


def test_a_wrapper_counts_as_one_step(one):
    """Whether it calls the model, or the model's `forward`."""
    code = """
    import peft
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    found = []
    for my_it in (my_model, peft.get_peft_model(my_model, config)):
        before = begun()
        logits_of(my_it)
        found.append(begun() - before)
    result = found
    """
    assert one.run(code) == [1, 1]


def test_a_generation_stops_between_two_tokens(one, working, tmp_path):
    one.begin("result = stream(mark) == my_stream", mark=tmp_path / "mark")
    wait_until((tmp_path / "mark").exists, "it streams", WITHIN_S)
    with working("job"):
        assert not one.answered()
    assert one.finish() is True


def test_a_training_step_is_not_interrupted_before_its_backward_pass(one, working, tmp_path):
    """The backward pass and the optimizer go on while the process may begin no step; the next call waits."""
    code = """
    my_optimizer = torch.optim.SGD(my_model.parameters(), lr=0.1)
    before = begun()
    loss = my_model(my_ids, labels=my_ids).loss
    reach(mark)
    loss.backward()
    my_optimizer.step()
    found = [begun() - before, gate().may_begin()]
    pathlib.Path(after).touch()
    result = [*found, float(my_model(my_ids, labels=my_ids).loss.detach()) < float(loss.detach())]
    """
    one.begin(code, mark=tmp_path / "mark", after=tmp_path / "after")
    wait_until((tmp_path / "mark").exists, "the forward pass", WITHIN_S)
    with working("job"):
        assert (tmp_path / "after").exists()
        assert not one.answered()
    assert one.finish() == [2, False, True]


GENERATE_ON = """
my_end = threading.Event()
def my_generate():
    while not my_end.is_set():
        tokens_of(my_model)
threading.Thread(target=my_generate, daemon=True).start()
"""


@pytest.fixture
def other(store):
    """Return a P2 workload that makes steps while it is asked to."""
    with Stepping(store.directory, "other", priority=2) as made:
        wait_until(lambda: made.attached, "it has an arbiter")
        yield made


@pytest.fixture
def important(store, checkpoint, tmp_path):
    """Return a process of its own that generates until it is killed, as a P0 workload."""
    process = Job(store.directory, tmp_path / "important.log")
    load(process, checkpoint("llama-tied"), "wooly_workload='important', wooly_swap=False")
    process.run(GENERATE_ON)
    yield process
    process.kill()


def test_a_generation_holds_others_until_it_ends(important, other, compute):
    """Also one that is never swapped out."""
    with other.working():
        wait_until(lambda: compute("other").held, "the other one to be held", WITHIN_S)
        assert not compute("important").held
        important.run("my_end.set()")
        before = other.steps
        wait_until(lambda: other.steps > before + 3, "it goes on", WITHIN_S)
    assert compute("important").device_s > 0


def test_a_process_that_is_killed_holds_nobody(important, other, compute):
    with other.working():
        wait_until(lambda: compute("other").held, "the other one to be held", WITHIN_S)
        before = other.steps
        important.kill()
        wait_until(lambda: other.steps > before + 3, "it goes on", WITHIN_S)


def test_a_held_process_that_is_killed_is_forgotten(store, urgent, working, compute, checkpoint, tmp_path):
    process = Job(store.directory, tmp_path / "held.log")
    load(process, checkpoint("llama-tied"), "wooly_workload='held', wooly_priority=3")
    with working():
        process.run("wait_until_held()")
        process.begin("logits_of(my_model)")
        wait_until(lambda: compute("held").held, "it is held", WITHIN_S)
        process.kill()
        wait_until(lambda: compute("held") is None, "it is forgotten")
        before = urgent.steps
        wait_until(lambda: urgent.steps > before + 3, "steps go on", WITHIN_S)


def test_it_goes_on_without_the_arbiter(one, store, working):
    with working():
        one.run("wait_until_held()")
        one.begin("result = tokens_of(my_model) == my_tokens")
        (arbiter,) = store.children()
        os.kill(arbiter, signal.SIGKILL)
        assert one.finish() is True


def test_it_is_swapped_out_while_it_is_held(one, session, working, compute):
    with working():
        one.run("wait_until_held()")
        one.begin("result = tokens_of(my_model) == my_tokens")
        wait_until(lambda: compute("job").held, "it is held", WITHIN_S)
        session.workloads.move("job", out=True)
        assert not one.answered()
    assert one.finish() is True


def test_share_and_exclusive_use_are_arguments(job, compute, checkpoint):
    two = job("two")
    two.run("my_model = load(path, wooly_workload='shared', wooly_compute_share=25)", path=checkpoint("llama-tied"))
    found = compute("shared")
    assert (found.share, found.exclusive, found.gated, found.ungated) == (25.0, False, True, "")
    with pytest.raises(JobError, match=r"wooly_compute_share=30: all models of a process are one workload") as raised:
        two.run("load(path, wooly_compute_share=30)", path=checkpoint("qwen3"))
    assert raised.value.name == "ConfigError"


@pytest.mark.usefixtures("urgent")
def test_exclusive_use_is_refused_beside_others(job, checkpoint):
    """As an error: the model is not loaded without wooly instead."""
    with pytest.raises(JobError, match="urgent") as raised:
        job("two").run("my_model = load(path, wooly_exclusive=True)", path=checkpoint("llama-tied"))
    assert raised.value.name == "ExclusiveError"


def test_a_rank_is_never_held(job, working, compute, checkpoint):
    """As torchrun starts it; it counts for others all the same."""
    two = job("rank", WORLD_SIZE="2", RANK="0")
    load(two, checkpoint("llama-tied"), "wooly_workload='rank', wooly_priority=3")
    with working():
        assert two.run("result = tokens_of(my_model) == my_tokens") is True
    found = compute("rank")
    assert not found.gated
    assert "one of 2 ranks" in found.ungated
    assert found.held_s == 0


def test_an_encoder_that_generate_calls_by_itself_is_a_step(job, tmp_path):
    code = (
        STEPS
        + """
    my_config = transformers.T5Config(vocab_size=64, d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4,
        decoder_start_token_id=0, tie_word_embeddings=True)
    transformers.T5ForConditionalGeneration(my_config).save_pretrained(path)
    my_model = load(path, cls=transformers.AutoModelForSeq2SeqLM)
    before = begun()
    my_model.generate(torch.arange(3, 20)[None], max_new_tokens=4, min_new_tokens=4)
    result = begun() - before
    """.replace("\n    ", "\n")
    )
    two = job("two")
    two.run(OBSERVE)
    assert two.run(code, path=tmp_path) == 5


def test_a_model_that_transformers_loads_alone_takes_turns(job, compute, fresh, working):
    """With others of its process, as its workload computes on their device all the same."""
    path = fresh("llama")
    quantize(path)
    two = job("two")
    code = "my_model = load(path, wooly_workload='private', wooly_priority=3)\nresult = facts(my_model)[0]"
    assert two.run(PROMPT + OBSERVE + STEPS + code, path=path) == 0
    assert compute("private").gated
    with working():
        two.run("wait_until_held()")
        two.begin("before = begun()\nlogits_of(my_model)\nresult = begun() - before")
        wait_until(lambda: compute("private").held, "it is held", WITHIN_S)
        assert not two.answered()
    assert two.finish() == 1


def test_a_process_that_becomes_a_rank_is_held_no_more(job, checkpoint, compute, working, tmp_path):
    """Although no launcher said so when it loaded its model; the store hears of it a moment later."""
    ranks = [job(name) for name in ("one", "two")]
    for number, process in enumerate(ranks):
        load(process, checkpoint("llama-tied"), f"wooly_workload='late{number}', wooly_priority=3")
        assert compute(f"late{number}").gated
    for number, process in enumerate(ranks):
        code = "torch.distributed.init_process_group('gloo', init_method=method, rank=number, world_size=2)"
        process.begin(code, method=f"file://{tmp_path}/meeting", number=number)
    for process in ranks:
        process.finish()
    try:
        with working():
            for process in ranks:
                process.begin("wait_until_held()\nresult = tokens_of(my_model) == my_tokens")
            assert [process.finish() for process in ranks] == [True, True]
            for number in (0, 1):
                wait_until(lambda number=number: compute(f"late{number}").ungated, "the store to know it", WITHIN_S)
    finally:
        for process in ranks:
            process.run("torch.distributed.destroy_process_group()")
