"""Loading: what a process gets from the store is what stock transformers would have given it, read and kept once."""

from __future__ import annotations

import pytest
from hf.jobs import JobError
from support.mapped import own_bytes, segment_bytes
from support.models.zeroed import zero_one_norm

ONE_OF_EACH = [("llama-tied", None), ("mixtral", "float32"), ("bloom", "float16"), ("gpt2", None)]


@pytest.mark.parametrize(("family", "dtype"), ONE_OF_EACH)
def test_publisher_and_reader_are_as_stock(job, served, fresh, family, dtype):
    """All that can be seen of the model is equal: tensors, strides, ties, gradients, answers, and what is saved."""
    path = fresh(family)
    before = served().counters
    options = {"dtype": dtype} if dtype else {}
    code = "my_model = load(path, device_map, **options); result = describe(my_model)"
    stock = job("one").run(code, path=path, device_map=None, options=options)
    assert job("one").run("result = facts(my_model)")[0] == 0
    publisher = job("one").run(code, path=path, device_map="wooly:cpu", options=options)
    reader = job("two").run(code, path=path, device_map="wooly:cpu", options=options)
    assert publisher == stock
    assert reader == stock
    after = served().counters  # a publisher attaches to what it published
    assert (after.publishes - before.publishes, after.attaches - before.attaches) == (1, 2)
    assert after.fallbacks == before.fallbacks
    for name in ("one", "two"):
        shared, private, written = job(name).run("result = facts(my_model)")
        assert shared > 20 * private
        assert written == 0


def test_real_model(job, checkpoint, served):
    """SmolLM2-135M-Instruct: publisher and reader answer as stock does, and hold next to nothing of their own."""
    path = checkpoint("smollm2")
    code = "my_model = load(path, device_map); result = [logits(my_model), tokens(my_model), facts(my_model)]"
    *stock, _ = job("one").run(code, path=path, device_map=None)
    for name in ("one", "two"):
        *answers, (shared, private, _) = job(name).run(code, path=path, device_map="wooly:cpu")
        assert answers == stock
        assert shared > 250 << 20
        assert private < 1 << 20
    (found,) = [model for model in served().models if model.name == str(path)]
    assert found.readers == 2
    assert found.engine.startswith("transformers ")


def test_the_checkpoint_is_let_go_of(job, fresh):
    """Stock loading maps the file. The publisher keeps none of that, not even for its small private tensors."""
    path = fresh("gpt2")
    code = "my_model = load(path, device_map); result = open('/proc/self/maps').read().count(path)"
    assert job("one").run(code, path=path, device_map=None) > 0
    job("one").run("del my_model; import gc; gc.collect()")
    assert job("one").run(code, path=path, device_map="wooly:cpu") == 0
    assert job("two").run(code, path=path, device_map="wooly:cpu") == 0


def test_the_checkpoint_is_not_opened_on_a_hit(job, fresh, opened):
    """The publisher opens the weights; a reader does not, not even to look at their header."""
    path = fresh("llama")
    opened(path / "model.safetensors")
    job("one").run("my_model = load(path); result = facts(my_model)", path=path)
    assert opened() > 0
    shared, *_ = job("two").run("my_model = load(path); result = facts(my_model)", path=path)
    assert shared > 0
    assert opened() == 0


def test_four_at_once_load_once(job, fresh, served):
    """Four processes ask for a model that nobody has: one loads and publishes it, three wait and attach."""
    path = fresh("qwen2")
    jobs = [job(name) for name in ("one", "two", "three", "four")]
    before = served().counters
    for one in jobs:
        one.begin("my_model = load(path); result = [logits(my_model), facts(my_model)[0] > 0]", path=path)
    answers = [one.finish() for one in jobs]
    assert answers == [answers[0]] * 4
    assert answers[0][1]
    after = served().counters
    assert (after.publishes - before.publishes, after.attaches - before.attaches) == (1, 4)


def test_other_bytes_are_another_model(job, checkpoint, tmp_path, served):
    """A copy with one norm changed, under the same names and dates, gets its own norm, and shares the rest."""
    original = checkpoint("llama")
    copy = tmp_path / "copy"
    norm = zero_one_norm(original, copy)
    job("one").run("my_model = load(path)", path=original)
    before = served()
    zero = "my_model = load(path); result = bool(my_model.get_parameter(name).any())"
    assert job("one").run(zero, path=original, name=norm) is True
    assert job("two").run(zero, path=copy, name=norm) is False
    assert served().totals.resident_bytes - before.totals.resident_bytes <= 2 << 20
    (found,) = [model for model in served().models if model.name == str(copy)]
    assert found.unique_bytes < found.bytes / 100


def test_what_is_missing_is_made_and_private(job, checkpoint):
    """A classifier's head that the checkpoint lacks is initialized as stock does it; the rest is shared."""
    code = """
    torch.manual_seed(5)
    my_model, info = load(path, device_map, cls=transformers.AutoModelForSequenceClassification, num_labels=7,
                          output_loading_info=True)
    result = [{name: digest(it) for name, it in my_model.state_dict().items()},
              [sorted(map(str, info[name])) for name in sorted(info)], facts(my_model)[0] > 0,
              wooly_hf.stats(my_model.score).shared_bytes, wooly_hf.stats(my_model.score).private_bytes]
    """
    path = checkpoint("llama")
    stock = job("one").run(code, path=path, device_map=None)
    publisher = job("one").run(code, path=path, device_map="wooly:cpu")
    reader = job("two").run(code, path=path, device_map="wooly:cpu")
    assert stock[:3] == [*publisher[:2], False]
    assert publisher == reader
    assert publisher[2:] == [True, 0, 7 * 256 * 2]


def test_mismatched_sizes(job, checkpoint):
    """A head of another size than the checkpoint's is made anew, and told of in the same way; or refused alike."""
    code = """
    torch.manual_seed(5)
    my_model, info = load(path, device_map, vocab_size=1000, ignore_mismatched_sizes=True, output_loading_info=True)
    result = [{name: digest(it) for name, it in my_model.state_dict().items()},
              [sorted(map(str, info[name])) for name in sorted(info)]]
    """
    path = checkpoint("llama")
    stock = job("one").run(code, path=path, device_map=None)
    assert job("one").run(code, path=path, device_map="wooly:cpu") == stock
    assert job("two").run(code, path=path, device_map="wooly:cpu") == stock
    strictly = "load(path, device_map, vocab_size=1000)"
    errors = []
    for device_map in (None, "wooly:cpu"):
        with pytest.raises(JobError) as raised:
            job("two").run(strictly, path=path, device_map=device_map)
        errors.append((raised.value.name, raised.value.text))
    assert errors[0] == errors[1]


def test_equal_tensors_stay_apart(job, tmp_path):
    """Equal but untied weights are kept once, and yet a write to one changes no other; saving takes them for two."""
    make = """
    config = transformers.LlamaConfig(hidden_size=1024, intermediate_size=64, num_hidden_layers=3, vocab_size=64,
                                      num_attention_heads=8, tie_word_embeddings=False)
    my_model = transformers.LlamaForCausalLM(config)
    for layer in my_model.model.layers:
        layer.self_attn.q_proj.weight.data.fill_(0.5)
        layer.input_layernorm.weight.data.fill_(1)
    my_model.save_pretrained(path)
    """
    job("one").run(make, path=tmp_path)
    code = """
    my_model = load(path)
    with torch.no_grad():
        my_model.model.layers[1].self_attn.q_proj.weight.add_(1)
        my_model.model.layers[1].input_layernorm.weight.add_(1)
    result = [[layer.self_attn.q_proj.weight.unique().tolist(), layer.input_layernorm.weight.unique().tolist()]
              for layer in my_model.model.layers]
    result.append(len(saved(my_model)))
    """
    for name in ("one", "two"):
        first, second, third, names = job(name).run(code, path=tmp_path)
        assert [first, second, third] == [[[0.5], [1.0]], [[1.5], [2.0]], [[0.5], [1.0]]]
        assert names == 3 * 9 + 3


def test_a_part_of_a_model_is_not_its_whole(job, checkpoint):
    """The base model and the one with a head are different models of one checkpoint, each right."""
    code = """
    my_model = load(path, device_map, cls=getattr(transformers, cls))
    result = {name: digest(it) for name, it in my_model.state_dict().items()}
    """
    path = checkpoint("gpt2")
    for cls in ("AutoModel", "AutoModelForCausalLM"):
        stock = job("one").run(code, path=path, cls=cls, device_map=None)
        assert job("one").run(code, path=path, cls=cls, device_map="wooly:cpu") == stock
        assert job("two").run(code, path=path, cls=cls, device_map="wooly:cpu") == stock


def test_the_peak_of_a_miss_is_not_two_models(job, store, checkpoint):
    """Loading and publishing SmolLM2 in fp32: this process's own memory and the store's together, and what is left."""
    one = job("peak")
    began = own_bytes(one.pid) + segment_bytes(store.pid)
    one.begin("my_model = load(path, dtype='float32'); result = facts(my_model)", path=checkpoint("smollm2"))
    peak = 0
    while not one.answered():
        peak = max(peak, own_bytes(one.pid) + segment_bytes(store.pid) - began)
    shared, _, written = one.finish()
    assert shared > 500 << 20
    assert written == 0
    assert shared < peak < 1.4 * shared
    assert own_bytes(one.pid) + segment_bytes(store.pid) - began < 1.15 * shared
