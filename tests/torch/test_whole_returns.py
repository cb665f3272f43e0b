"""Models that share a segment leave their device and return in any order, without private memory.

On a GPU the publisher writes blobs of other models from the segment's host copy, on a CPU the store does.
"""

from __future__ import annotations

import pytest
import torch
from support.content import key
from support.stores import StoreProcess
from support.torch_models import MIN_BYTES, Layers

from shared_store.client.session import Session
from shared_store.sleep.sleeper import Sleeper
from shared_store.torch.devices import backend_of, store_device
from shared_store.torch.publish import Publication, publish

ONE, TWO = key(1), key(2)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the models are, for torch."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible")
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(params=["host memory", "files"])
def connect(request, directory, tmp_path):
    """Return a function that connects to a store, whose host copies of a GPU's models are in this tier."""
    budget = None if request.param == "host memory" else 0
    store = StoreProcess(
        directory, redis_url=f"unix://{directory}/away", swap_dir=str(tmp_path), host_budget=budget
    ).start()
    opened = []

    def make(name):
        opened.append(Session.connect(directory, name=name, autostart=False))
        return opened[-1]

    yield make
    for session in opened:
        session.close()
    store.clean_up()


class Engine:
    """A model of layers that count from `first`, published or attached, with its sleeper."""

    def __init__(self, session, model_key, device, first=0):
        self.first = first
        self.model = Layers(first=first).to(device)
        self.model.held = []
        publication = Publication(model_key, "model", "test", store_device(device), {})
        asked = session.open(
            model_key, name="model", engine="test", device=publication.device, publish=True, timeout_s=30
        )
        assert asked is None
        backend = backend_of(device)
        manifest, mapped, _ = publish(session, publication, self.model, backend, min_bytes=MIN_BYTES)
        self.addresses = [layer.data_ptr() for layer in self.model.layers]
        self.sleeper = Sleeper(
            session, manifest, mapped.places, mapped.segments, mapped.mappings(), backend, timeout_s=30
        )

    def sleep(self):
        if self.model.layers[0].device.type == "cuda":
            torch.cuda.synchronize()
        self.sleeper.sleep()

    def check(self):
        """Everything is where it was, shared, with the right values."""
        assert self.sleeper.wake().private_bytes == 0
        assert [layer.data_ptr() for layer in self.model.layers] == self.addresses
        for number, layer in enumerate(self.model.layers, start=self.first):
            assert torch.equal(layer.cpu(), torch.arange(layer.numel()).float() + number)


def resident(session, device):
    return next(found.resident_bytes for found in session.status().devices if found.id == store_device(device))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_in_either_order(connect, device, order):
    """The second model has layers of the first one's segment, and others."""
    session = connect("test")
    engines = [Engine(connect("one"), ONE, device), Engine(connect("two"), TWO, device, first=2)]
    before = resident(session, device)
    for _ in range(2):
        for engine in engines:
            engine.sleep()
        assert resident(session, device) == 0
        for number in order:
            engines[number].check()
        assert resident(session, device) == before
    assert session.status().counters.fallbacks == 0


def test_a_new_process_while_all_sleep(connect, device):
    """It publishes the second model again, with the first one's layers in the same segment."""
    session = connect("test")
    one, two = Engine(connect("one"), ONE, device), Engine(connect("two"), TWO, device, first=2)
    before = resident(session, device)
    one.sleep()
    two.sleep()
    fresh = Engine(connect("fresh"), TWO, device, first=2)
    one.check()
    two.check()
    fresh.sleeper.wake()
    assert resident(session, device) == before
    assert session.status().counters.fallbacks == 0
