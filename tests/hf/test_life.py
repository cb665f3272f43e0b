"""Operations on a shared model: writing, copying, saving, changing and deleting it."""

from __future__ import annotations

import pytest
from support.mapped import segment_ranges
from support.waiting import wait_until


@pytest.fixture
def pair(job, checkpoint):
    """Return two processes with the same model, and its path."""
    path = checkpoint("llama-tied")
    for name in ("one", "two"):
        job(name).run("my_model = load(path); my_before = describe(my_model)", path=path)
    return job("one"), job("two")


def peer_is_as_before(peer):
    return peer.run("result = describe(my_model) == my_before and facts(my_model)[2] == 0")


def test_in_place_writes_stay_private_and_are_counted(pair):
    """A write to one row makes a page private, which the statistics show; the peer is unaffected."""
    one, two = pair
    shared, private, written = one.run("result = facts(my_model)")
    assert written == 0
    code = """
    with torch.no_grad():
        my_model.model.embed_tokens.weight[5].add_(1)
    result = [facts(my_model), facts(my_model.model.embed_tokens), facts(my_model.model.layers)]
    """
    whole, embedding, layers = one.run(code)
    assert whole == [shared - 4096, private + 4096, 4096]
    assert embedding == [2048 * 256 * 2 - 4096, 4096, 4096]
    assert layers[2] == 0
    assert sum(one.private_bytes for one in segment_ranges(one.pid)) == 4096
    assert peer_is_as_before(two)


def test_training_stays_private_and_warns_once(pair):
    """An optimizer over shared weights works as in stock and makes them private; one warning says so."""
    one, two = pair
    code = """
    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return digest(model.model.embed_tokens.weight), logits(model)
    my_stock = load(path, None)
    result = [train(my_stock), train(my_model), facts(my_model)]
    """
    assert "optimizer" not in one.log()
    stock, trained, (shared, _, written) = one.run(code)
    assert trained == stock
    assert written > 20 * shared
    assert one.log().count("SGD.step writes to shared weights") == 1
    assert peer_is_as_before(two)


COPIES = {
    "deepcopy": "import copy; my_copy = copy.deepcopy(my_model)",
    "pickle": "import pickle; my_copy = pickle.loads(pickle.dumps(my_model))",
    "torch.save": """
import io
stream = io.BytesIO()
torch.save(my_model, stream)
stream.seek(0)
my_copy = torch.load(stream, weights_only=False)
""",
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_private(pair, how):
    """A copy equals the model in private memory; writing to it affects neither the original nor the peer."""
    one, two = pair
    code = """
    result = [describe(my_copy) == my_before, facts(my_copy)[0], facts(my_model)[2]]
    with torch.no_grad():
        my_copy.model.embed_tokens.weight.zero_()
    result += [describe(my_model) == my_before, facts(my_model)[2]]
    """
    assert one.run(COPIES[how] + "\n" + "\n".join(line.strip("\n")[4:] for line in code.splitlines())) == [
        True,
        0,
        0,
        True,
        0,
    ]
    assert peer_is_as_before(two)


def test_saved_and_loaded_again(pair, tmp_path):
    """Files of `save_pretrained` of a shared model load to an equal model, stock and shared."""
    one, two = pair
    code = """
    my_model.save_pretrained(path)
    result = [describe(load(path, None)) == my_before, describe(load(path)) == my_before]
    """
    assert one.run(code, path=tmp_path) == [True, True]
    assert peer_is_as_before(two)


def test_conversions_and_resizing(pair):
    """`.to`, `.half` and a larger vocabulary: results are private and equal stock's; the peer is unaffected."""
    one, two = pair
    code = """
    def change(model):
        torch.manual_seed(3)
        model.resize_token_embeddings(2100)
        found = [model.lm_head.weight is model.model.embed_tokens.weight, digest(model.lm_head.weight[:2048])]
        found.append(digest(model.model.embed_tokens.weight))
        model.to(torch.float32)
        found.append(digest(model.model.layers[0].mlp.up_proj.weight))
        model.half()
        return [*found, logits(model)]
    result = [change(load(path, None)), change(my_model), facts(my_model)[0]]
    """
    stock, changed, shared = one.run(code)
    assert changed == stock
    assert shared == 0
    assert peer_is_as_before(two)


def test_unshare_makes_a_part_private_and_keeps_ties(pair):
    """A layer, then all: equal bytes, the same objects, no byte shared; views in the model follow."""
    one, two = pair
    code = """
    my_model.my_view = my_model.model.embed_tokens.weight.detach()[3:5]
    before, objects = facts(my_model), [id(it) for it in my_model.parameters()]
    layer = wooly_hf.unshare(my_model.model.layers[0])
    result = [layer > 0, facts(my_model.model.layers[0])[0], facts(my_model)[0] == before[0] - layer]
    rest = wooly_hf.unshare(my_model)
    with torch.no_grad():
        my_model.lm_head.weight[3].fill_(7)
    result += [rest == before[0] - layer, facts(my_model)[0], wooly_hf.unshare(my_model),
               objects == [id(it) for it in my_model.parameters()], my_model.my_view[0].unique().tolist(),
               my_model.model.embed_tokens.weight[3].unique().tolist()]
    """
    assert one.run(code) == [True, 0, True, True, 0, 0, True, [7.0], [7.0]]
    assert peer_is_as_before(two)


def test_the_lease_and_the_mapping_end_with_the_model(job, served, fresh):
    """`del` unmaps and ends the lease; a part that outlives its model keeps the mapping, but not the lease."""
    path = fresh("qwen3")
    one = job("one")

    def readers():
        return [model.readers for model in served().models if model.name == str(path)]

    before = segment_ranges(one.pid)
    one.run("my_model = load(path)", path=path)
    assert readers() == [1]
    assert len(segment_ranges(one.pid)) > len(before)
    value = one.run("my_part = my_model.model.layers[1].mlp; result = digest(my_part.up_proj.weight)")
    one.run("import gc; del my_model; gc.collect()")
    wait_until(lambda: readers() == [0], "the lease is over")
    assert one.run("result = digest(my_part.up_proj.weight)") == value
    assert one.run("result = facts(my_part)[0] > 0")
    assert len(segment_ranges(one.pid)) > len(before)
    one.run("del my_part; gc.collect()")
    assert segment_ranges(one.pid) == before


def test_state_dict_into_a_shared_model(pair):
    """On a CPU, `load_state_dict` works as in stock, in private pages."""
    one, two = pair
    code = """
    my_model.load_state_dict({name: torch.zeros_like(it) for name, it in my_model.state_dict().items()})
    result = [any(it.any() for it in my_model.parameters()), facts(my_model)[0]]
    """
    anything, shared = one.run(code)
    assert not anything
    assert shared < 4096
    assert peer_is_as_before(two)
