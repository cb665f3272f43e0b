"""How sharing is requested, and what happens to models that cannot be shared."""

from __future__ import annotations

import pytest
from hf.jobs import JobError


@pytest.fixture
def parsing(job):
    """Return a process with `parse` imported."""
    one = job("one")
    one.run("from wooly_hf.device_map import parse")
    return one


def test_device_maps(parsing):
    """Device maps that request sharing, and the device map that is passed to transformers."""
    code = """
    result = [None if (found := parse(it)) is None else [found.inner] for it in given]
    """
    given = ["wooly:cpu", "wooly:cuda:1", "wooly:1", "wooly:auto"]
    assert parsing.run(code, given=given) == [[None], ["cuda:1"], [1], ["auto"]]
    given = [{"": "wooly:cuda:0"}, {"a": "wooly:cpu", "b": "disk"}]
    assert parsing.run(code, given=given) == [[{"": "cuda:0"}], [{"a": "cpu", "b": "disk"}]]
    assert parsing.run(code, given=[None, "cpu", "auto", 0, {"": "cpu"}, "woolly", "wool"]) == [None] * 7
    assert parsing.run("result = parse('wooly').inner == ('cuda' if torch.cuda.is_available() else None)")
    assert parsing.run("result = parse('wooly:') == parse('wooly')")


def test_the_map_overrides_the_default_device(parsing):
    """Under another default device, `wooly:cpu` is still the CPU."""
    assert parsing.run("with torch.device('meta'): result = parse('wooly:cpu').inner") == "cpu"


@pytest.mark.parametrize("wrong", ["wooly:nowhere", "wooly:cuda:x"])
def test_an_invalid_device(job, checkpoint, wrong):
    """The error lists valid devices."""
    with pytest.raises(JobError, match="is not a device; use wooly, wooly:cpu") as raised:
        job("one").run("load(path, wrong)", path=checkpoint("llama"), wrong=wrong)
    assert raised.value.name == "ConfigError"


@pytest.mark.parametrize("device_map", [{"": "wooly:cpu"}, {"model": "wooly:cpu", "lm_head": "cpu"}, "wooly:auto"])
def test_maps_onto_one_device(job, checkpoint, device_map):
    """Dicts and `auto` share if all modules are placed on one device."""
    code = "my_model = load(path, device_map); result = [facts(my_model)[0] > 0, logits(my_model)]"
    shared, answer = job("one").run(code, path=checkpoint("llama"), device_map=device_map)
    assert shared
    assert answer == job("one").run("my_stock = load(path, None); result = logits(my_stock)")


def test_pipeline(job, checkpoint):
    """`pipeline(device_map="wooly")`: stock's text, from shared weights."""
    code = """
    def ask(**options):
        global my_model
        made = transformers.pipeline("text-generation", path, **options)
        my_model = made.model
        text = made("hello", max_new_tokens=8, do_sample=False)
        return [text, facts(my_model)[0] > 0, str(made.device)]
    result = [ask(device_map="cpu"), ask(device_map="wooly:cpu")]
    """
    (stock, private, place), (text, shared, same_place) = job("one").run(code, path=checkpoint("llama"))
    assert text == stock
    assert (private, shared) == (False, True)
    assert same_place == place


def test_a_changed_file_is_not_published(job, served, fresh):
    """A checkpoint that changes while it is loaded is not published; the process uses the weights that it read."""
    path = fresh("llama")
    code = """
    import pathlib
    from wooly_hf.steps import TransformersSteps
    file = pathlib.Path(path, "model.safetensors")
    stock = TransformersSteps.load_to_publish
    def load_and_touch(self):
        found = stock(self)
        file.touch()
        return found
    TransformersSteps.load_to_publish = load_and_touch
    try:
        my_model = load(path)
    finally:
        TransformersSteps.load_to_publish = stock
    result = [logits(my_model), facts(my_model)[0]]
    """
    answer = job("one").run("my_stock = load(path, None); result = logits(my_stock)", path=path)
    assert job("one").run(code, path=path) == [answer, 0]
    assert "changed while it was being loaded" in job("one").log()
    assert not [model for model in served().models if model.name == str(path)]


def test_strict(job, served, checkpoint):
    """With `WOOLY_STRICT=1`, models that can be shared are shared."""
    one = job("strict", WOOLY_STRICT="1")
    assert one.run("my_model = load(path); result = facts(my_model)[0] > 0", path=checkpoint("llama"))
    clients = [client for client in served().clients if client.pid == one.pid]
    found = sorted((client.role, client.kind) for client in clients)
    assert found == [("idle", "transformers"), ("reader", "transformers")]  # the workload's and the model's


def test_everywhere_by_the_environment(job, checkpoint, tmp_path):
    """With the variable on, loading onto one device shares, however it is named; otherwise stock, without a warning."""
    one = job("everywhere", WOOLYAI_WEIGHTS_DEDUP="true")
    code = "my_model = load(path, device_map, **options); result = facts(my_model)[0] > 0"
    for device_map in (None, "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, "auto", "wooly:cpu"):
        assert one.run(code, path=checkpoint("llama"), device_map=device_map, options={}) is True
    several = {"model": "cpu", "lm_head": "disk"}
    options = {"offload_folder": str(tmp_path)}
    assert one.run(code, path=checkpoint("llama"), device_map=several, options=options) is False
    nowhere = {"max_memory": {"cpu": 0}, **options}
    assert one.run(code, path=checkpoint("llama"), device_map="auto", options=nowhere) is False
    assert "the stock way" not in one.log()


def test_a_model_with_its_own_way_to_load(job, served, checkpoint):
    """A class that overrides the wrapped method loads as in stock, with a warning and a count."""
    code = """
    class Own(transformers.LlamaForCausalLM):
        @classmethod
        def _load_pretrained_model(cls, model, state_dict, files, load_config, expected_keys=None):
            return before(model, state_dict, files, load_config, expected_keys)
    before = transformers.PreTrainedModel._load_pretrained_model.__wrapped__
    my_model = Own.from_pretrained(path, device_map="wooly:cpu")
    result = [logits(my_model), facts(my_model)[0]]
    """
    one, counted = job("one"), served().counters.fallbacks
    answer = one.run("my_stock = load(path, None); result = logits(my_stock)", path=checkpoint("llama"))
    assert one.run(code, path=checkpoint("llama")) == [answer, 0]
    assert "has its own way to load weights" in one.log()
    assert served().counters.fallbacks == counted + 1
