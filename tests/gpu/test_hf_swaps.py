"""A transformers process on a GPU leaves it and returns: VRAM is free meanwhile, and results are equal."""

from __future__ import annotations

import pytest
from hf.jobs import Job
from support.models import large_llama
from support.stores import store_without_catalog
from support.waiting import wait_until

from shared_store.base.errors import DeclinedError
from shared_store.client.session import Session
from shared_store.overcommit import support

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]

MIB = 1 << 20
BEGINNING = """
from wooly_hf.workload import process
my_ids = torch.arange(3, 40, device="cuda")[None]
def state():
    return process.current().state.value
def logits_of(model):
    with torch.no_grad():
        return digest(model(my_ids).logits)
def tokens_of(model):
    return model.generate(my_ids, max_new_tokens=12, do_sample=False).tolist()
def free():
    torch.cuda.synchronize(); torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
my_model = load(path, "wooly:cuda:0", wooly_workload="job")
my_logits, my_tokens = logits_of(my_model), tokens_of(my_model)
"""


@pytest.fixture(scope="module")
def store(gpu, gpu_of_torch):
    assert gpu_of_torch == gpu
    for name in ("transformers", "accelerate"):
        pytest.importorskip(name)
    if not support.GPUS:
        pytest.skip(support.REFUSAL)
    yield from store_without_catalog(min_resident_s=0.0, turn_s=0.2)


@pytest.fixture(scope="module")
def process(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    large_llama.run("make", str(folder / "model"), "--layers", "1", "--vocabulary", "320")
    made = Job(store.directory, folder / "log")
    made.run(BEGINNING, path=folder / "model")
    yield made
    made.kill()


@pytest.fixture
def move(store):
    with Session.connect(store.directory, autostart=False, name="test") as session:
        yield lambda *, out: session.workloads.move("job", out=out)


def test_host_copies_are_made_ahead(process, store):
    """Before anything leaves, so that the first departure copies no weights."""
    with Session.connect(store.directory, autostart=False, name="test") as session:
        wait_until(lambda: sum(it.host_bytes for it in session.status().models) > 250 * MIB, "copies", timeout_s=60)
    assert process.run("result = state()") == "resident"


def test_vram_is_free_while_it_is_away(process, move):
    """Over several swaps; logits and tokens are equal, and addresses of weights are the same."""
    addresses = "result = [it.data_ptr() for it in my_model.parameters()]"
    before, there = process.run("result = free()"), process.run(addresses)
    for _ in range(3):
        move(out=True)
        assert process.run("result = [state(), free()]")[0] == "swapped"
        assert process.run("result = free()") > before + 250 * MIB
        assert process.run("result = [logits_of(my_model) == my_logits, state()]") == [True, "resident"]
        assert process.run(addresses) == there
        assert process.run("result = facts(my_model)[0]") > 250 * MIB
        move(out=True)
        assert process.run("result = tokens_of(my_model) == my_tokens")


@pytest.mark.parametrize(
    "way",
    [
        "digest(my_model.lm_head.weight)",
        "[digest(it) for it in my_model.state_dict().values()]",
        "digest(torch.no_grad()(my_model.model)(my_ids).last_hidden_state)",
    ],
)
def test_other_ways_to_the_weights_bring_it_back(process, move, way):
    """Without a fault in a kernel, which would end the process's context."""
    expected = process.run(f"result = {way}")
    move(out=True)
    assert process.run(f"result = {way}") == expected
    assert process.run("result = [state(), logits_of(my_model) == my_logits]") == ["resident", True]


def test_a_reference_from_outside_keeps_it(process, move):
    process.run("my_held = my_model.lm_head.weight.detach()")
    with pytest.raises(DeclinedError, match="referred to from outside"):
        move(out=True)
    process.run("del my_held")
    move(out=True)
    assert process.run("result = logits_of(my_model) == my_logits")


def test_kernels_in_flight_end_before_it_leaves(process, move):
    """A call whose kernels still run when the hooks have ended."""
    code = """
    with torch.no_grad():
        for _ in range(20):
            my_out = my_model(my_ids).logits
    """
    process.run(code)
    move(out=True)
    assert process.run("result = digest(my_out) == my_logits")


def test_a_captured_graph_is_replayed_after_a_swap(process, move):
    """Its replay brings the weights back to the addresses that it has."""
    code = """
    my_stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(my_stream):
        my_model.model.layers[0].mlp(my_input := torch.ones(1, my_model.config.hidden_size, dtype=my_model.dtype,
            device="cuda"))
    torch.cuda.synchronize()
    my_graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(my_graph):
        my_output = my_model.model.layers[0].mlp(my_input)
    my_graph.replay()
    result = digest(my_output)
    """
    expected = process.run(code)
    move(out=True)
    assert process.run("my_output.zero_(); my_graph.replay(); result = [state(), digest(my_output)]") == [
        "resident",
        expected,
    ]


def test_a_compiled_model_leaves_and_returns(process, move):
    """Compiled code and its graphs have the addresses of weights, and the hooks are outside of it."""
    code = """
    my_compiled = torch.compile(my_model, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            my_results = digest(my_compiled(my_ids).logits)
    """
    process.run(code)
    move(out=True)
    call = "result = [torch.no_grad()(lambda: digest(my_compiled(my_ids).logits))() == my_results, state()]"
    assert process.run(call) == [True, "resident"]
