"""After sleep and wake, tensors are the same objects at the same addresses, with the same values, and shared."""

from __future__ import annotations

import gc

import pytest
import torch
from client.test_publish import Layers
from client.torch_models import KEY, MIN_BYTES, attach, grant, mapped_segments, publish_model
from support.content import key
from torch import nn

from shared_store.memory import MemfdBackend
from shared_store.sleep.sleep import Sleeper
from shared_store.torch.bind import bind
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.publish import Publication, publish

MIB = 1 << 20


class Twins(nn.Module):
    """Equal but untied tensors: one blob with a mapping for each; and a private tensor."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.arange(MIB // 2).float(), requires_grad=False)
        self.other = nn.Parameter(torch.arange(MIB // 2).float(), requires_grad=False)
        self.small = nn.Parameter(torch.arange(4.0), requires_grad=False)


def sleeper(session, manifest, blobs):
    return Sleeper(session, manifest, blobs.places, blobs.segments, blobs.mappings(), MemfdBackend(), timeout_s=30.0)


def values(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def where(model):
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def slept(model, sleeping):
    """Sleep, wake, and describe the model again."""
    before, addresses, ranges = values(model), where(model), mapped_segments()
    for _ in range(3):
        sleeping.sleep()
        assert mapped_segments() == 0
        woken = sleeping.wake()
        assert woken.private_bytes == 0
        assert where(model) == addresses
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert mapped_segments() == ranges


@pytest.mark.parametrize("build", [Layers, Twins])
def test_publisher_and_reader(sessions, build):
    """For both, and for blobs that are mapped once or more."""
    model = build()
    session = sessions("publisher")
    manifest, blobs, _ = publish_model(session, model)
    slept(model, sleeper(session, manifest, blobs))
    del model, blobs
    gc.collect()
    session.close()
    reading = sessions("reader")
    manifest, blobs = attach(reading)
    with Placeholders(MIN_BYTES) as placeholders:
        model = build()
    bind(model, manifest, blobs, placeholders, min_bytes=MIN_BYTES)
    slept(model, sleeper(reading, manifest, blobs))


def test_a_publisher_whose_blobs_another_committed(sessions):
    """It is bound to its own segment and the other's: both are released, and mapped again."""
    one, two = sessions("one"), sessions("two")
    second = Layers(count=6)
    grant(two, key(2))
    planned = []

    def meanwhile(_):
        if not planned:
            planned.append(publish_model(one, Layers(), KEY))

    publication = Publication(key(2), "two", "test", "cpu", {})
    manifest, blobs, _ = publish(two, publication, second, MemfdBackend(), min_bytes=MIN_BYTES, progress=meanwhile)
    planned.clear()
    gc.collect()
    assert len(blobs.segments) == 2
    slept(second, sleeper(two, manifest, blobs))
    second.assert_right()


def test_a_model_that_dies_asleep(sessions):
    """No mapping is left in this process, and the store releases the model."""
    session = sessions()
    model = Layers()
    manifest, blobs, _ = publish_model(session, model)
    sleeping = sleeper(session, manifest, blobs)
    sleeping.sleep()
    del model, blobs, sleeping
    gc.collect()
    session.close()
    assert mapped_segments() == 0
    assert [one.readers for one in sessions().status().models] == [0]
