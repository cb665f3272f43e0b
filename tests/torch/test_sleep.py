"""Tensors of a model that slept: the same objects, addresses and values, shared again."""

from __future__ import annotations

import gc

import pytest
import torch
from support.content import key
from support.torch_models import KEY, MIN_BYTES, Layers, attach, grant, mapped_segments, publish_model
from torch import nn

from shared_store.memory import MemfdBackend
from shared_store.sleep.sleeper import Sleeper
from shared_store.torch.bind import bind
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.publish import Publication, publish

MIB = 1 << 20


class Twins(nn.Module):
    """Equal but untied tensors (one blob, mapped twice), and a private tensor."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.arange(MIB // 2).float(), requires_grad=False)
        self.other = nn.Parameter(torch.arange(MIB // 2).float(), requires_grad=False)
        self.small = nn.Parameter(torch.arange(4.0), requires_grad=False)


def sleeper(session, manifest, blobs):
    """Make the sleeper of a mapped model."""
    return Sleeper(session, manifest, blobs.places, blobs.segments, blobs.mappings(), MemfdBackend(), timeout_s=30.0)


def values(model):
    """Copy all parameters."""
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def addresses(model):
    """Return the address of each parameter."""
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def check_sleep(model, sleeping):
    """Sleep and wake several times; nothing of the model may change."""
    before, bound, ranges = values(model), addresses(model), mapped_segments()
    for _ in range(3):
        sleeping.sleep()
        assert mapped_segments() == 0
        woken = sleeping.wake()
        assert woken.private_bytes == 0
        assert addresses(model) == bound
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert mapped_segments() == ranges


@pytest.mark.parametrize("build", [Layers, Twins])
def test_publisher_and_reader(sessions, build):
    """Both roles, with blobs that are mapped once or more."""
    model = build()
    session = sessions("publisher")
    manifest, blobs, _ = publish_model(session, model)
    check_sleep(model, sleeper(session, manifest, blobs))
    del model, blobs
    gc.collect()
    session.close()
    reading = sessions("reader")
    manifest, blobs = attach(reading)
    with Placeholders(MIN_BYTES) as placeholders:
        model = build()
    bind(model, manifest, blobs, placeholders, min_bytes=MIN_BYTES)
    check_sleep(model, sleeper(reading, manifest, blobs))


def test_a_publisher_that_shares_blobs_with_another_model(sessions):
    """It is bound to its own segment and to the other model's: both are unmapped and mapped again."""
    one, two = sessions("one"), sessions("two")
    second = Layers(count=6)
    grant(two, key(2))
    published = []

    def publish_other(_):
        if not published:
            published.append(publish_model(one, Layers(), KEY))

    publication = Publication(key(2), "two", "test", "cpu", {})
    manifest, blobs, _ = publish(two, publication, second, MemfdBackend(), min_bytes=MIN_BYTES, progress=publish_other)
    published.clear()
    gc.collect()
    assert len(blobs.segments) == 2
    check_sleep(second, sleeper(two, manifest, blobs))
    second.assert_right()


def test_a_model_that_is_deleted_asleep(sessions):
    """Nothing stays mapped in this process, and the store counts no reader."""
    session = sessions()
    model = Layers()
    manifest, blobs, _ = publish_model(session, model)
    sleeping = sleeper(session, manifest, blobs)
    sleeping.sleep()
    del model, blobs, sleeping
    gc.collect()
    session.close()
    assert mapped_segments() == 0
    assert [found.readers for found in sessions().status().models] == [0]
