"""Where memory is read-only, known writers raise an error with the next step before they write.

On a GPU it is; here the guards are told so, and everything else is real.
"""

from __future__ import annotations

import pytest
from hf.jobs import JobError

REFUSE = """
import wooly_hf.guards
wooly_hf.guards.refuses_writes = lambda mapping: True
my_model = load(path)
my_before = describe(my_model)
"""


@pytest.fixture
def refusing(job, checkpoint):
    """Return a process with a model whose memory the guards take for read-only."""
    one = job("refusing")
    one.run(REFUSE, path=checkpoint("llama-tied"))
    return one


WRITERS = {
    "optimizer": (
        """
        optimizer = torch.optim.AdamW(my_model.parameters())
        my_model(torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
        optimizer.step()
        """,
        "AdamW.step would write to a parameter",
    ),
    "state dict": (
        "my_model.load_state_dict({name: torch.zeros_like(it) for name, it in my_model.state_dict().items()})",
        "load_state_dict would write to ",
    ),
    "state dict of a part": (
        "my_part = my_model.model.layers[0].mlp; my_part.load_state_dict(my_part.state_dict())",
        "load_state_dict would write to (gate|up|down)_proj.weight",
    ),
    "initialization": (
        """
        my_layer = my_model.model.layers[0].mlp.up_proj
        my_layer.weight = torch.nn.Parameter(my_layer.weight.detach())
        my_layer._is_hf_initialized = my_model._is_hf_initialized = False
        my_model.init_weights()
        """,
        "initializing weights would write to Linear.weight",
    ),
    "merging": (
        """
        import peft
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        my_adapted = peft.get_peft_model(my_model, config)
        my_adapted.merge_and_unload()
        """,
        r"merging an adapter in place \(safe_merge=True would not\) would write to weight",
    ),
    "merging a layer": (
        """
        import peft
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        my_adapted = peft.get_peft_model(my_model, config)
        my_model.model.layers[0].self_attn.q_proj.merge()
        """,
        "merging an adapter",
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_refused(refusing, writer):
    """The error names the writer and `wooly_hf.unshare`, and no byte has changed; after `unshare` the code works."""
    code, message = WRITERS[writer]
    with pytest.raises(JobError, match=message) as raised:
        refusing.run(code)
    assert raised.value.name == "SharedWriteError"
    assert "wooly_hf.unshare(model)" in raised.value.text
    digests = "result = sorted({digest(it) for name, it in my_model.named_parameters() if 'lora' not in name})"
    after = refusing.run(digests)
    assert after == refusing.run("my_other = load(path, None)\n" + digests.replace("my_model", "my_other"))
    assert refusing.run("result = facts(my_model)[2]") == 0
    refusing.run("wooly_hf.unshare(my_model)")
    refusing.run(code.replace("peft.get_peft_model(my_model, config)", "my_adapted"))


def test_what_does_not_write_is_allowed(refusing):
    """Safe merging, state of adapters, assigned tensors, frozen parameters, and loading into copies."""
    code = """
    import peft, copy, pickle
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    my_adapted = peft.get_peft_model(my_model, config)
    peft.set_peft_model_state_dict(my_adapted, peft.get_peft_model_state_dict(my_adapted))
    optimizer = torch.optim.AdamW(my_adapted.parameters())
    my_adapted(torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
    optimizer.step()
    my_adapted.merge_and_unload(safe_merge=True)
    state = {name: torch.zeros_like(it) for name, it in my_model.state_dict().items()}
    for my_copy in (copy.deepcopy(my_model), pickle.loads(pickle.dumps(my_model))):
        my_copy.load_state_dict(state)
    data = pickle.dumps(my_model)
    result = [facts(my_model)[2], b"wooly" in data]
    my_model.load_state_dict(state, assign=True)
    """
    assert refusing.run(code) == [0, False]


def test_loading_a_partly_initialized_model(refusing, checkpoint):
    """Missing weights are initialized beside shared ones, without an error."""
    code = """
    my_model = load(path, cls=transformers.AutoModelForSequenceClassification, num_labels=3)
    result = facts(my_model)[0] > 0
    """
    assert refusing.run(code, path=checkpoint("llama-tied"))


def test_hooks_of_other_classes_run_when_a_layer_is_defined(refusing):
    """A mixin's `__init_subclass__` gets the keywords of the class statement, and the layer's `merge` is guarded."""
    code = """
    import peft.tuners.tuners_utils as tuners
    seen = []
    class Registered:
        def __init_subclass__(cls, tag, **others):
            super().__init_subclass__(**others)
            seen.append([cls.__name__, tag])
    class MyLayer(tuners.BaseTunerLayer, Registered, tag="mine"):
        def merge(self, safe_merge=False):
            pass
    result = [seen, getattr(MyLayer.merge, "_wooly", False)]
    """
    assert refusing.run(code) == [[["MyLayer", "mine"]], True]


def test_a_hook_of_the_layers_base_class_itself_runs(refusing):
    """As in a PEFT that defines `__init_subclass__` there: for each class once, before its `merge` is guarded."""
    code = """
    import types, wooly_hf.guards
    seen = []
    class Base:
        def __init_subclass__(cls, tag="", **others):
            super().__init_subclass__(**others)
            seen.append([cls.__name__, tag, hasattr(cls.merge, "_wooly")])
    wooly_hf.guards._guard_peft(types.SimpleNamespace(BaseTunerLayer=Base))
    class MyLayer(Base, tag="mine"):
        def merge(self, safe_merge=False):
            pass
    class Derived(MyLayer):
        pass
    result = [seen, getattr(MyLayer.merge, "_wooly", False), "merge" in vars(Derived)]
    """
    assert refusing.run(code) == [[["MyLayer", "mine", False], ["Derived", "", True]], True, False]
