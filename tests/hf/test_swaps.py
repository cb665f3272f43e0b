"""A transformers process is a workload: it leaves its device, and every way to its weights brings it back."""

from __future__ import annotations

import pytest
from hf.jobs import JobError
from hf.stock_ways import quantize
from support.mapped import segment_ranges
from support.stores import store_without_catalog
from support.waiting import wait_until

from shared_store.base.errors import DeclinedError
from shared_store.client.session import Session

GIB = 1 << 30
PROMPT = "my_ids = torch.arange(3, 40)[None]\n"
OBSERVE = """
from wooly_hf.workload import process
def state():
    return process.current().state.value
def logits_of(model):
    with torch.no_grad():
        return digest(model(my_ids).logits)
def tokens_of(model):
    return model.generate(my_ids, max_new_tokens=12, do_sample=False).tolist()
"""


@pytest.fixture(scope="module")
def store():
    """Start a store with a budget for the memory of this machine."""
    yield from store_without_catalog(budget={"cpu": 8 * GIB}, vram_reserve=0, min_resident_s=0.0, turn_s=0.2)


@pytest.fixture
def move(store):
    """Return a function that swaps a workload out or in, by its name, once the store has heard that it started."""
    with Session.connect(store.directory, autostart=False, name="test") as session:

        def moved(name="job", *, out):
            def started():
                return name not in {one.name for one in session.status().workloads if one.starting}

            wait_until(started, f"{name} to have started")
            return session.workloads.move(name, out=out)

        yield moved


@pytest.fixture
def one(job, checkpoint):
    """Return a process with a model and what it computes, as a workload named `job`."""
    one = job("one")
    one.run(
        PROMPT + OBSERVE + "my_model = load(path, wooly_workload='job')\n"
        "my_logits, my_tokens, my_before = logits_of(my_model), tokens_of(my_model), describe(my_model)",
        path=checkpoint("llama-tied"),
    )
    yield one
    one.forget()


def test_it_leaves_and_returns_with_the_same_results(one, move):
    """Nothing is mapped while it is away; logits and tokens are equal afterwards, over several swaps."""
    for _ in range(3):
        assert segment_ranges(one.pid)
        move(out=True)
        assert one.run("result = state()") == "swapped"
        assert segment_ranges(one.pid) == []
        assert one.run("result = [logits_of(my_model) == my_logits, state()]") == [True, "resident"]
        move(out=True)
        assert one.run("result = tokens_of(my_model) == my_tokens")
    assert one.run("result = facts(my_model)[1:]") == one.run("result = [facts(my_model)[1], 0]")


def test_a_command_brings_it_back(one, move):
    move(out=True)
    move(out=False)
    assert one.run("result = state()") == "resident"
    assert segment_ranges(one.pid)


WAYS = {
    "a parameter": "result = digest(my_model.lm_head.weight)",
    "a layer": "result = digest(my_model.model.layers[1].mlp(torch.ones(1, 256, dtype=my_model.dtype)))",
    "the base model": "with torch.no_grad(): result = digest(my_model.model(my_ids).last_hidden_state)",
    "state_dict": "result = {name: digest(it) for name, it in my_model.state_dict().items()}",
    "parameters": "result = [digest(it) for it in my_model.parameters()]",
    "an iterator from before": "result = [digest(it) for it in my_early]",
    "deepcopy": "import copy; result = describe(copy.deepcopy(my_model)) == my_before",
    "a copy of a layer": "import copy; result = digest(copy.deepcopy(my_model.model.layers[0]).mlp.up_proj.weight)",
    "pickle": "import pickle; result = describe(pickle.loads(pickle.dumps(my_model))) == my_before",
    "torch.save": "import io; torch.save(my_model, io.BytesIO()); result = state()",
    "save_pretrained": "my_model.save_pretrained(path); result = describe(load(path, None)) == my_before",
    "functional_call": """
with torch.no_grad():
    result = digest(torch.func.functional_call(my_model, {}, (my_ids,)).logits)
""",
    "a pipeline's call": "result = my_model.generate(my_ids, max_new_tokens=3, num_beams=2, do_sample=False).tolist()",
    "compiled": "with torch.no_grad(): result = digest(my_compiled(my_ids).logits)",
    "a compiled part": "with torch.no_grad(): result = digest(my_part(my_ids).last_hidden_state)",
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_weights_brings_it_back(one, move, tmp_path, way):
    """The result is the one of a process that never left."""
    code = "my_early = iter(my_model.parameters())\n"
    if "compiled" in way:
        code += (
            "my_compiled, my_part = (torch.compile(it, backend='eager') for it in (my_model, my_model.model))\n"
            "with torch.no_grad(): my_compiled(my_ids), my_part(my_ids)\n"
        )
    one.run(code)
    expected = one.run(WAYS[way], path=tmp_path)
    one.run("result = None; my_early = iter(my_model.parameters()); gc.collect()")
    move(out=True)
    assert one.run("result = state()") == "swapped"
    assert one.run(WAYS[way], path=tmp_path) == expected
    assert one.run("result = [state(), facts(my_model)[2]]") == ["resident", 0]


CHANGES = {
    "half": "result = describe(my_model.half())",
    "to": "result = describe(my_model.to(torch.float32))",
    "resize": "torch.manual_seed(3); my_model.resize_token_embeddings(2100); result = describe(my_model)",
    "unshare": "wooly_hf.unshare(my_model); result = describe(my_model)",
    "adapter": """
import peft
torch.manual_seed(3)
my_model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
result = [digest(it) for it in my_model.parameters()] + [logits_of(my_model)]
""",
    "merge": """
import peft
torch.manual_seed(3)
config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
my_model = peft.get_peft_model(my_model, config).merge_and_unload()
result = [describe(my_model), logits_of(my_model)]
""",
    "load_state_dict": """
my_model.load_state_dict({name: torch.zeros_like(it) for name, it in my_model.state_dict().items()})
result = describe(my_model)
""",
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_bring_it_back_and_equal_stocks(one, move, checkpoint, change):
    stock = one.run(
        "my_kept = my_model; my_model = load(path, None)\n" + CHANGES[change], path=checkpoint("llama-tied")
    )
    one.run("my_model = my_kept; del my_kept; gc.collect()")
    move(out=True)
    assert one.run("result = state()") == "swapped"
    assert one.run(CHANGES[change]) == stock
    assert one.run("result = state()") == "resident"


HOLDERS = {
    "a parameter": "my_held = my_model.lm_head.weight",
    "a detached tensor": "my_held = my_model.lm_head.weight.detach()",
    "a view": "with torch.no_grad(): my_held = my_model.lm_head.weight[3:5]",
    "an array": "my_held = my_model.lm_head.weight.detach().view(torch.int16).numpy()",
    "a storage": "my_held = my_model.lm_head.weight.untyped_storage()",
    "a state dict": "my_held = my_model.state_dict()",
    "a list": "my_held = list(my_model.parameters())",
    "an iterator": "my_held = iter(my_model.parameters()); next(my_held)",
    "a register": "my_held = my_model.lm_head._parameters",
    "a part that was replaced": "my_held, my_model.model.layers[1].mlp = my_model.model.layers[1].mlp, None",
    "a thread": """
import threading
my_go, my_at = threading.Event(), threading.Event()
def my_user(weight):
    my_at.set()
    my_go.wait()
threading.Thread(target=lambda: my_user(my_model.lm_head.weight), daemon=True).start()
my_at.wait()
""",
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_it_stays_while_something_else_has_its_weights(one, move, holder):
    """What was taken out of the model before stays valid, because the memory does not leave; then it does."""
    one.run(HOLDERS[holder])
    with pytest.raises(DeclinedError, match="referred to from outside of the model"):
        move(out=True)
    assert one.run("result = state()") == "resident"
    assert segment_ranges(one.pid)
    if holder == "a part that was replaced":
        one.run("my_model.model.layers[1].mlp = my_held")
    one.run("if 'my_go' in globals(): my_go.set()\nmy_held = None; gc.collect()")
    wait_until(lambda: _left(move), "it can leave")
    assert one.run("result = logits_of(my_model) == my_logits")


def _left(move):
    try:
        move(out=True)
    except DeclinedError:
        return False
    return True


def test_it_stays_once_an_output_required_grad(one, move):
    """As soon as a backward pass could follow, for good; with the reason."""
    one.run("my_model(my_ids)")
    with pytest.raises(DeclinedError, match="required grad"):
        move(out=True)


def test_it_stays_once_an_optimizer_has_a_parameter(one, move):
    one.run("torch.optim.SGD(my_model.model.layers[0].parameters(), lr=0.1)")
    with pytest.raises(DeclinedError, match=r"an optimizer \(SGD\) has parameters"):
        move(out=True)


def test_an_optimizer_of_other_parameters_does_not_matter(one, move):
    one.run("torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)")
    move(out=True)


def test_it_stays_while_pages_that_it_wrote_would_be_lost(one, move):
    one.run("with torch.no_grad(): my_model.model.embed_tokens.weight[5].add_(1)")
    with pytest.raises(DeclinedError, match="wrote to 4096 bytes"):
        move(out=True)
    assert one.run("result = describe(my_model) != my_before and logits_of(my_model) != my_logits")


def test_statistics_do_not_bring_it_back(one, move):
    before = one.run("result = facts(my_model)")
    move(out=True)
    assert one.run("result = [facts(my_model), state()]") == [before, "swapped"]
    one.run("my_model.eval(); my_model.train(); len(my_model.lm_head._parameters); 'weight' in dir(my_model.lm_head)")
    assert one.run("result = state()") == "swapped"


def test_a_model_that_is_deleted_while_it_is_away(one, move, served):
    """The workload ends with its last model, and nothing stays mapped or open."""
    move(out=True)
    one.run("del my_model; gc.collect()")
    wait_until(lambda: not [it for it in served().clients if it.pid == one.pid], "its sessions have ended")
    assert segment_ranges(one.pid) == []
    assert one.run("result = process.current() is None")


def test_two_models_leave_and_return_together(one, move, checkpoint):
    """Also if the second is loaded while the first is away: that brings the first back."""
    move(out=True)
    code = """
    my_second = load(path)
    result = [state(), logits_of(my_model) == my_logits]
    my_others = logits_of(my_second)
    """
    assert one.run(code, path=checkpoint("qwen3")) == ["resident", True]
    move(out=True)
    assert segment_ranges(one.pid) == []
    assert one.run("result = [logits_of(my_second) == my_others, logits_of(my_model) == my_logits]") == [True, True]


def test_a_forked_child_says_why_it_cannot_use_the_models(one, move):
    """It has no connection; forked while the models are there, it uses them."""
    code = """
    import os, multiprocessing
    def child(pipe):
        try:
            pipe.send(str(logits_of(my_model) == my_logits))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
    ours, theirs = multiprocessing.Pipe()
    forked = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    forked.start()
    result = ours.recv() if ours.poll(60) else "nothing"
    forked.join()
    """
    assert one.run(code) == "True"
    move(out=True)
    assert "UnsupportedError: this process was forked while" in one.run(code)
    assert one.run("result = state()") == "swapped"


def test_arguments_describe_the_workload(job, checkpoint, move):
    """They do not reach transformers, and later models of the process cannot contradict them."""
    two = job("two")
    code = OBSERVE + "my_model = load(path, wooly_swap=False, wooly_priority=3, wooly_workload='kept')"
    two.run(code, path=checkpoint("llama-tied"))
    found = "result = [process.current().name, process.current()._agent.priority]"
    assert two.run(found) == ["kept", 3]
    with pytest.raises(DeclinedError, match="its user does not let it be swapped out"):
        move("kept", out=True)
    with pytest.raises(JobError, match="wooly_priority=1: all models of a process are one workload") as raised:
        two.run("my_second = load(path, wooly_priority=1)", path=checkpoint("qwen3"))
    assert raised.value.name == "ConfigError"
    two.run("my_second = load(path, wooly_priority=3)", path=checkpoint("qwen3"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("wooly_priority=7", "priority 7: use 0"),
        ("wooly_swap='maybe'", "swap 'maybe': use true or false"),
        ("wooly_workload=3", "workload 3: use a text"),
        ("wooly_compute_share=101", "compute_share 101: use a percentage from 1 to 100"),
        ("wooly_compute_share='half'", "compute_share 'half': use a number"),
        ("wooly_exclusive='maybe'", "exclusive 'maybe': use true or false"),
    ],
)
def test_wrong_arguments_are_errors_that_name_right_ones(job, checkpoint, arguments, message):
    with pytest.raises(JobError, match=message) as raised:
        job("two").run(f"load(path, {arguments})", path=checkpoint("llama-tied"))
    assert raised.value.name == "ConfigError"


def test_arguments_without_the_device_map_are_an_error(job, checkpoint):
    with pytest.raises(JobError, match='are for models with device_map="wooly"'):
        job("two").run("load(path, None, wooly_swap=True)", path=checkpoint("llama-tied"))


def test_a_model_that_is_not_shared_makes_it_stay(job, checkpoint, fresh, move):
    """The store lists the process with the reason."""
    two = job("two")
    two.run(OBSERVE + "my_model = load(path, wooly_workload='private')", path=checkpoint("llama-tied"))
    move("private", out=True)
    quantized = fresh("llama")
    quantize(quantized)
    two.run("my_second = load(path)", path=quantized)
    with pytest.raises(DeclinedError, match="a model of it is not shared"):
        move("private", out=True)


def test_callers_of_an_unswappable_model_can_be_compiled_as_one_graph(job, checkpoint):
    """Compiled code skips its hooks."""
    code = """
    my_model = load(path, wooly_swap=False)
    @torch.compile(fullgraph=True, backend="eager")
    def my_caller(ids):
        return my_model(ids).logits + 1
    with torch.no_grad():
        result = my_caller(torch.arange(3, 9)[None]).shape[-1]
    """
    assert job("two").run(code, path=checkpoint("llama-tied")) == 2048


def test_replays_of_graphs_enter_the_gate(one, move):
    """A graph has the addresses of weights."""
    code = """
    from wooly_hf.workload.entrances import watch_graphs
    class my_Graph:
        def replay(self):
            return [state(), process.current().gate.in_use]
    watch_graphs(my_Graph)
    watch_graphs(my_Graph)
    result = my_Graph().replay()
    """
    move(out=True)
    assert one.run(code) == ["resident", True]
    move(out=True)


def test_the_activity_shows_calls(one, store):
    """Idle since the last call, and never busy between calls, however they end."""
    code = """
    try:
        my_model(torch.full((1, 3), 10**9))
    except Exception as error:
        result = type(error).__name__
    """
    assert one.run(code) == "IndexError"
    one.run("logits_of(my_model)")
    with Session.connect(store.directory, autostart=False, name="test") as session:
        (found,) = [it.activity for it in session.status().clients if it.pid == one.pid and it.activity]
    assert (found.busy, found.running, found.waiting) == (False, 0, 0)
    assert found.idle_s < 60


def test_peft_models_leave_and_return(one, move):
    """Through the wrapper's call and `generate`; adapters stay in private memory."""
    code = """
    import peft
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    my_adapted = peft.get_peft_model(my_model, config)
    my_adapted.eval()
    my_results = [logits_of(my_adapted), my_adapted.generate(input_ids=my_ids, max_new_tokens=5).tolist()]
    result = my_results[0] != my_logits
    """
    assert one.run(code)
    for part in ("logits_of(my_adapted) == my_results[0]", "tokens(my_adapted) == my_results[1]"):
        move(out=True)
        code = "tokens = lambda it: it.generate(input_ids=my_ids, max_new_tokens=5).tolist()\n"
        assert one.run(code + f"result = [state(), {part}, state()]") == ["swapped", True, "resident"]
    assert segment_ranges(one.pid)


def test_interrupting_a_call_does_not_keep_the_model(one, move, served):
    """`KeyboardInterrupt` passes torch's hooks by; the activity ends some seconds later."""
    code = """
    def interrupt(*_):
        raise KeyboardInterrupt
    hook = my_model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        logits_of(my_model)
    except KeyboardInterrupt:
        pass
    hook.remove()
    """
    one.run(code)
    wait_until(
        lambda: not any(it.activity.busy for it in served().clients if it.pid == one.pid and it.activity), "it is idle"
    )
    move(out=True)
    assert one.run("result = logits_of(my_model) == my_logits")


def test_threads_that_generate_are_interrupted_many_times(one, move):
    """Several threads generate, and one calls a layer that no hook guards; the results of all are equal."""
    code = """
    import threading, time
    my_found, my_end = [], threading.Event()
    def generate():
        while not my_end.is_set():
            my_found.append(tokens_of(my_model) == my_tokens)
    def layer():
        with torch.no_grad():
            return digest(my_model.model.layers[1].mlp(torch.ones(1, 256, dtype=my_model.dtype)))
    def call_layer():
        while not my_end.is_set():
            my_found.append(layer() == my_layer)
            time.sleep(0.005)
    my_layer = layer()
    my_threads = [threading.Thread(target=it, daemon=True) for it in (generate, generate, call_layer)]
    for thread in my_threads:
        thread.start()
    """
    one.run(code)
    for _ in range(8):
        wait_until(lambda: _left(move), "it leaves")
    one.run("my_end.set()\nfor thread in my_threads: thread.join(60)")
    assert one.run("result = [all(my_found), len(my_found) > 3]") == [True, True]


def test_a_cap_under_mps_is_refused_on_a_cpu(job, checkpoint):
    with pytest.raises(JobError, match="WOOLY_MPS_PERCENT=25 caps a workload on GPUs") as raised:
        job("capped", WOOLY_MPS_PERCENT="25").run("load(path)", path=checkpoint("llama-tied"))
    assert raised.value.name == "ConfigError"
