"""PEFT over a shared base: adapters are private, and operations on them affect one process only."""

from __future__ import annotations

import pytest

MAKE = """
import peft
def make(folder, seed):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load(path, None), config)
    adapted.save_pretrained(folder)
"""


@pytest.fixture
def adapters(job, checkpoint, tmp_path):
    """Return the base's path, and the folders of two adapters."""
    path = checkpoint("llama")
    job("one").run(MAKE, path=path)
    for number in (1, 2):
        job("one").run("make(folder, seed)", folder=tmp_path / str(number), seed=number)
    return path, [tmp_path / "1", tmp_path / "2"]


WAYS = {
    "PeftModel": "my_model = peft.PeftModel.from_pretrained(load(path, base_map), folder)",
    "AutoPeftModel": "my_model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, **options)",
    "adapter folder": "my_model = load(folder, base_map)",
}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_over_a_shared_base(job, adapters, way):
    """However an adapter is loaded: stock's answers, another answer than the base's, base shared, adapter private."""
    path, folders = adapters
    code = f"""
import peft
options = {{"device_map": base_map}} if base_map else {{}}
{WAYS[way]}
lora = [it for name, it in my_model.named_parameters() if "lora_" in name]
from shared_store.torch.mapping_registry import mapping_of
result = [logits(my_model), len(lora), sum(it.nbytes for it in lora), any(mapping_of(it) for it in lora),
          facts(my_model)]
"""
    base = job("one").run("my_model = load(path); result = logits(my_model)", path=path)
    answers = []
    for number, folder in enumerate(folders):
        stock, *_ = job("one").run(code, path=path, folder=folder, base_map=None)
        answer, count, delta, mapped, (shared, private, written) = job(("one", "two")[number]).run(
            code, path=path, folder=folder, base_map="wooly:cpu"
        )
        assert answer == stock
        assert count == 8
        assert not mapped
        assert written == 0
        assert private < delta + 64 * 1024
        assert shared > 20 * delta
        answers.append(answer)
    assert len({base, *answers}) == 3


def test_merging_in_one_process_leaves_the_other_as_it_was(job, adapters):
    """`merge_and_unload` writes to private pages: a peer with the same base is bit-equal after it."""
    path, folders = adapters
    code = """
    import peft
    my_model = peft.PeftModel.from_pretrained(load(path), folder)
    result = my_before = {name: digest(it) for name, it in my_model.named_parameters()}, logits(my_model)
    """
    for name, folder in zip(("one", "two"), folders, strict=True):
        job(name).run(code, path=path, folder=folder)
    merge = """
    def merge(model):
        merged = model.merge_and_unload()
        return [digest(merged.model.layers[0].self_attn.q_proj.weight), logits(merged)]
    my_stock = peft.PeftModel.from_pretrained(load(path, None), folder)
    result = [merge(my_stock), merge(my_model), facts(my_model)[2]]
    """
    stock, merged, written = job("one").run(merge, path=path, folder=folders[0])
    assert merged == stock
    assert written >= 2 * (256 * 256 + 128 * 256) * 2
    unchanged = """
    now = {name: digest(it) for name, it in my_model.named_parameters()}, logits(my_model)
    result = [now == my_before, facts(my_model)[2]]
    """
    assert job("two").run(unchanged) == [True, 0]


def test_training_an_adapter_leaves_the_base_shared(job, adapters):
    """Gradients reach the adapter only, bit-equal to stock: no page of the base is written, and there is no warning."""
    path, folders = adapters
    code = """
    import peft
    def train(base):
        model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
        optimizer = torch.optim.AdamW((it for it in model.parameters() if it.requires_grad), lr=1e-2)
        for _ in range(3):
            model(torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: digest(it) for name, it in model.named_parameters()}, logits(model)
    my_base = load(path)
    result = [train(load(path, None)), train(my_base), facts(my_base)]
    """
    stock, trained, (shared, _, written) = job("two").run(code, path=path, folder=folders[0])
    assert trained == stock
    assert shared > 0
    assert written == 0
    assert "writes to shared weights" not in job("two").log()
