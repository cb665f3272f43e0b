"""transformers on a GPU: shared weights answer as stock's do, cost VRAM once, and known writers are stopped."""

from __future__ import annotations

import shutil

import pytest
from hf.jobs import Job, JobError
from support.models import large_llama
from support.stores import store_without_catalog
from support.waiting import wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]

ON_GPU = "wooly:cuda:0"


@pytest.fixture(scope="module")
def store(gpu, gpu_of_torch):
    """A running store."""
    assert gpu_of_torch == gpu
    for name in ("transformers", "accelerate", "peft"):
        pytest.importorskip(name)
    yield from store_without_catalog()


@pytest.fixture(scope="module")
def processes(store, tmp_path_factory):
    """Two processes with transformers and wooly."""
    logs = tmp_path_factory.mktemp("jobs")
    made = [Job(store.directory, logs / name) for name in ("one", "two")]
    yield made
    for one in made:
        one.kill()


@pytest.fixture
def pair(processes):
    yield processes
    for one in processes:
        one.forget()


@pytest.mark.parametrize(
    ("family", "options"), [("llama-tied", {}), ("mixtral", {"dtype": "float32"}), ("gpt2", {"dtype": "float16"})]
)
def test_publisher_and_reader_are_as_stock(pair, store, checkpoint, family, options):
    """Tensors, ties, answers and saved files on the GPU equal those of stock loading."""
    code = "my_model = load(path, device_map, **options); result = [describe(my_model), facts(my_model)]"
    path = checkpoint(family)
    before = store.client().session.status().counters
    stock, (none, *_) = pair[0].run(code, path=path, device_map="cuda:0", options=options)
    assert none == 0
    assert all(tensor[1] == "cuda:0" for tensor in stock["tensors"].values())
    for one in pair:
        described, (shared, private, written) = one.run(code, path=path, device_map=ON_GPU, options=options)
        assert described == stock
        assert shared > 20 * private
        assert written == 0
    after = store.client().session.status().counters
    assert (after.publishes - before.publishes, after.attaches - before.attaches) == (1, 2)
    assert after.fallbacks == before.fallbacks


def test_vram_is_paid_once(pair, tmp_path):
    """A second process with the model uses a fraction of its size beyond what every process uses."""
    path = tmp_path / "model"
    large_llama.run("make", str(path), "--layers", "1", "--vocabulary", "320")
    code = """
    torch.zeros(1, device="cuda")
    def free():
        torch.cuda.synchronize(); torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    before = free()
    my_model = load(path, device_map)
    result = [before - free(), facts(my_model)[0]]
    """
    taken, shared = pair[0].run(code, path=path, device_map=ON_GPU)
    assert shared > 250 << 20
    assert taken < shared + (64 << 20)
    taken, shared = pair[1].run(code, path=path, device_map=ON_GPU)
    assert shared > 250 << 20
    assert taken < 16 << 20


@pytest.fixture
def reader(pair, checkpoint):
    """Return a process with a small model; another process reads the same model."""
    for one in pair:
        one.run("my_model = load(path, device_map); my_before = describe(my_model)", **on_gpu(checkpoint))
    yield pair[0]
    assert pair[1].run("result = describe(my_model) == my_before")


def on_gpu(checkpoint):
    return {"path": checkpoint("llama-tied"), "device_map": ON_GPU}


WRITERS = {
    "optimizer": """
        optimizer = torch.optim.AdamW(my_model.parameters())
        ids = torch.arange(3, 40, device=my_model.device)[None]
        my_model(ids, labels=ids).loss.backward()
        optimizer.step()
        """,
    "state dict": "my_model.load_state_dict({n: torch.zeros_like(it) for n, it in my_model.state_dict().items()})",
    "merging": """
        import peft
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        my_adapted = peft.get_peft_model(my_model, config)
        my_adapted.merge_and_unload()
        """,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_known_writers_are_refused_before_a_kernel_runs(reader, writer):
    """A typed error names `unshare`; the GPU still works, and after `unshare` the same code does."""
    with pytest.raises(JobError) as raised:
        reader.run(WRITERS[writer])
    assert raised.value.name == "SharedWriteError"
    assert "wooly_hf.unshare(model)" in raised.value.text
    assert reader.run("torch.cuda.synchronize(); result = facts(my_model)[2]") == 0
    reader.run("wooly_hf.unshare(my_model)")
    reader.run(WRITERS[writer].replace("peft.get_peft_model(my_model, config)", "my_adapted"))
    assert reader.run("torch.cuda.synchronize(); result = facts(my_model)[0]") == 0


def test_training_an_adapter(reader):
    """LoRA over a shared base: gradients reach the adapter as in stock, and nothing is written to the base."""
    code = """
    import peft
    def train(base):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW((it for it in model.parameters() if it.requires_grad), lr=1e-2)
        ids = torch.arange(3, 40, device=model.device)[None]
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: digest(it) for name, it in model.named_parameters() if "lora_" in name}
    my_stock = load(path, "cuda:0")
    result = [train(my_stock), train(my_model), facts(my_model)[0] > 0]
    """
    stock, trained, shared = reader.run(code)
    assert trained == stock
    assert shared


def test_copies_and_safe_merging_are_private(reader):
    """Operations that make new tensors work."""
    code = """
    import copy, peft
    my_copy = copy.deepcopy(my_model)
    my_copy.load_state_dict({n: torch.zeros_like(it) for n, it in my_copy.state_dict().items()})
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    my_merged = peft.get_peft_model(my_model, config).merge_and_unload(safe_merge=True)
    result = [facts(my_copy)[0], facts(my_merged)[0] > 0]
    """
    assert reader.run(code) == [0, True]


def test_deleting_the_model_frees_its_memory(pair, store, fresh_model):
    """`del` unmaps, ends the lease, and frees VRAM."""
    names = {"path": fresh_model, "device_map": ON_GPU}
    pair[0].run("my_model = load(path, device_map)", **names)

    def readers():
        models = store.client().session.status().models
        return [model.readers for model in models if model.name == str(fresh_model)]

    assert readers() == [1]
    pair[0].run("del my_model; import gc; gc.collect()")
    wait_until(lambda: readers() == [0], "the lease is over")


@pytest.fixture
def fresh_model(checkpoint, tmp_path):
    """Return a copy of a checkpoint under another path."""
    return shutil.copytree(checkpoint("qwen3"), tmp_path / "model")
