"""Random trees of modules, with ties, views, dtypes and layouts: bound tensors equal published ones bitwise."""

import itertools
import json
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from client.programs import start_program
from client.test_round_trip import made_dtypes
from client.torch_models import MIN_BYTES, publish_model, read_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.content import key
from support.stores import StoreProcess
from torch import nn

from shared_store.client.session import Session

NUMBERS = itertools.count(1000)
SIZES = (0, 1, 3, 16, 60)

tensors = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["parameter", "buffer", "transient", "attribute"]),
        "dtype": st.sampled_from(made_dtypes()),
        "shape": st.lists(st.sampled_from(SIZES), max_size=3),
        "layout": st.sampled_from(["plain", "plain", "turned", "every second", "expanded", "offset"]),
        "values": st.integers(0, 2),  # few, so that some tensors are equal
        "same": st.sampled_from(["none", "none", "none", "object", "storage"]),  # as the tensor before it
    }
)
modules = st.recursive(
    st.fixed_dictionaries({"tensors": st.lists(tensors, max_size=4), "children": st.just([])}),
    lambda inner: st.fixed_dictionaries(
        {"tensors": st.lists(tensors, max_size=3), "children": st.lists(inner, max_size=3), "alias": st.booleans()}
    ),
    max_leaves=6,
)


def laid_out(spec):
    """Make an uninitialised tensor with a spec's shape (transposed if so) and layout."""
    dtype, shape = getattr(torch, spec["dtype"]), spec["shape"]
    if spec["layout"] == "turned" and len(shape) > 1:
        return torch.empty(shape, dtype=dtype).transpose(0, -1)
    if spec["layout"] == "every second" and shape:
        return torch.empty([*shape[:-1], 2 * shape[-1]], dtype=dtype)[..., ::2]
    if spec["layout"] == "expanded" and shape:
        return torch.empty([1, *shape[1:]], dtype=dtype).expand(shape)
    if spec["layout"] == "offset" and shape:
        return torch.empty([shape[0] + 5, *shape[1:]], dtype=dtype)[5:]
    return torch.empty(shape, dtype=dtype)


class Random(nn.Module):
    """Build a model of a specification, uninitialised as engines do."""

    def __init__(self, spec, before=None):
        super().__init__()
        before = [] if before is None else before
        for number, one in enumerate(spec["tensors"]):
            tensor = laid_out(one)
            if before and one["same"] == "object":
                tensor = before[-1]
            elif before and one["same"] == "storage":
                tensor = before[-1].detach()[..., :1] if before[-1].dim() else before[-1].detach()
            self.take(f"t{number}", tensor, one["kind"])
            before.append(getattr(self, f"t{number}"))
        self.children_ = nn.ModuleList(Random(child, before) for child in spec["children"])
        if spec.get("alias") and spec["children"]:
            self.alias = self.children_[0]

    def take(self, name, tensor, kind):
        if kind == "parameter":
            is_placeholder = isinstance(tensor, nn.Parameter)
            setattr(self, name, tensor if is_placeholder else nn.Parameter(tensor, requires_grad=False))
        elif kind == "attribute":
            self.__dict__[name] = tensor
        else:
            self.register_buffer(name, tensor, persistent=kind == "buffer")


def named(model):
    """Return each tensor by path, with its kind."""
    for path, module in model.named_modules(remove_duplicate=False):
        for kind, group in (("p", module._parameters), ("b", module._buffers), ("a", vars(module))):
            for name, it in group.items():
                if isinstance(it, torch.Tensor) and (it.numel() or kind != "a"):
                    yield f"{path}.{name}", kind, it


def fill(model, spec):
    """Fill all storages; equally for equal `values`."""
    values = [one["values"] for one in every_tensor(spec)] or [0]
    seen = {}
    for number, (_, _, it) in enumerate(named(model)):
        storage = it.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = number
            data = torch.empty(0, dtype=torch.uint8).set_(storage)
            pattern = torch.arange(data.numel()) + values[number % len(values)]
            data.copy_(pattern % (2 if it.dtype is torch.bool else 251))


def every_tensor(spec):
    return [*spec["tensors"], *(one for child in spec["children"] for one in every_tensor(child))]


def bytes_of(tensor):
    """Return the elements' bytes in order, whatever their strides."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8).tolist()


def has_content(spec):
    """Return True if there is a byte to share. The shape is not enough: storage may be that of an empty tensor."""
    return any(tensor.numel() for _, _, tensor in named(Random(spec)))


def described(model):
    """Return all that binding promises: bytes, dtype, shape, stride, kind, grad, shared objects and shared storages."""
    objects, storages, found = {}, {}, {}
    for path, kind, it in named(model):
        pointer = it.untyped_storage().data_ptr() if it.numel() else 0
        found[path] = [
            kind,
            str(it.dtype),
            list(it.shape),
            list(it.stride()),
            it.requires_grad,
            bytes_of(it.detach()),
            objects.setdefault(id(it), len(objects)),
            storages.setdefault(pointer, len(storages)) if pointer else None,
        ]
    return found


@pytest.fixture(scope="module")
def runtime():
    """One store for all examples."""
    with tempfile.TemporaryDirectory(prefix="wooly-") as directory:
        store = StoreProcess(directory, redis_url=f"unix://{directory}/away").start()
        yield Path(directory)
        store.clean_up()


def check_round_trip(runtime, spec, model_key):
    model = Random(spec)
    fill(model, spec)
    expected = described(model)
    with Session.connect(runtime, autostart=False) as session:
        publish_model(session, model, model_key, min_bytes=MIN_BYTES)
        assert described(model) == expected
        with Session.connect(runtime, autostart=False) as other:
            reader, _ = read_model(other, lambda: Random(spec), model_key)
            assert described(reader) == expected
    return expected


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(spec=modules.filter(has_content))
def test_any_model_in_one_process(runtime, spec):
    """Publisher and reader have every tensor of the original, with the same objects and storages in common."""
    check_round_trip(runtime, spec, key(next(NUMBERS)))


ELSEWHERE = """
import json, sys
from pathlib import Path
from client.test_random_models import Random, described
from client.torch_models import read_model
from shared_store.client.session import Session
specs = json.load(sys.stdin)
with Session.connect(Path(sys.argv[1]), autostart=False) as session:
    print(json.dumps([described(read_model(session, lambda: Random(spec), key)[0]) for key, spec in specs]))
"""


def test_any_model_in_another_process(runtime):
    """The same in other processes, which share only the store; a few at once."""
    specs = []

    @settings(max_examples=8, database=None, deadline=None, derandomize=True)
    @given(spec=modules.filter(has_content))
    def choose(spec):
        specs.append(spec)

    choose()
    models, expected = [], []
    with Session.connect(runtime, autostart=False) as session:
        for number, spec in enumerate(specs):
            model = Random(spec)
            fill(model, spec)
            expected.append(described(model))
            publish_model(session, model, key(number), min_bytes=MIN_BYTES)
            models.append(model)
        process = start_program(ELSEWHERE, runtime, stdin=subprocess.PIPE)
        out, err = process.communicate(json.dumps([(key(n), spec) for n, spec in enumerate(specs)]), timeout=90)
    assert process.returncode == 0, err
    assert json.loads(out) == expected
