"""A model that nobody has is loaded while its checkpoint is hashed, and never published under a key of other bytes."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import time

import pytest
import torch
from support.torch_models import MIN_BYTES
from support.waiting import wait_until
from torch import nn

from shared_store.base import checkpoint
from shared_store.base.errors import CheckpointError
from shared_store.client import identify
from shared_store.client.identify import Checkpoint
from shared_store.torch import fallback
from shared_store.torch.bind import bind, measure
from shared_store.torch.fallback import Fallback
from shared_store.torch.load import Settings, load
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.steps import Description, Identity, Loaded

SHAPE = (256, 256)
LOG = logging.getLogger("load-ahead-test")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SHAPE), requires_grad=False)


class Steps:
    """Steps of an engine that loads ahead, and records the order of its calls."""

    loads_ahead = True

    def __init__(self, file, name="plain model", *, while_loading=lambda: None):
        self.file, self.name, self.while_loading = file, name, while_loading
        self.calls = []

    def prepare(self):
        pass

    def sharing(self):
        return contextlib.nullcontext()

    def identify(self):
        return Identity(torch.device("cpu"), Checkpoint([("weights", self.file)]), {"engine": "plain"})

    def attach(self, manifest, mapped):
        self.calls.append("attach")
        with Placeholders(MIN_BYTES) as placeholders:
            model = Model()
        return Loaded(model, model), bind(model, manifest, mapped, placeholders, min_bytes=MIN_BYTES)

    def load_to_publish(self):
        self.calls.append("load_to_publish")
        model = self._read()
        self.while_loading()
        return Loaded(model, model)

    def discard(self, loaded):
        self.calls.append("discard")
        loaded.model.weight.data = torch.empty(0)

    def describe(self, _):
        return Description({})

    def bound(self, shared):
        self.calls.append("published" if shared.published else "attached")
        return measure(shared.loaded.model, shared.mapped)

    def left_private(self, _):
        self.calls.append("left_private")

    def load_stock(self):
        self.calls.append("load_stock")
        return self._read()

    def _read(self):
        model = Model()
        model.weight.copy_(torch.frombuffer(bytearray(self.file.read_bytes()), dtype=torch.float32).view(SHAPE))
        return model


def written(path, first=0):
    """A checkpoint of one file, whose identity is as of one that was written long ago."""
    path.write_bytes(torch.arange(first, first + SHAPE[0] * SHAPE[1], dtype=torch.float32).numpy().tobytes())
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    return path


def right(model, first=0):
    expected = torch.arange(first, first + SHAPE[0] * SHAPE[1], dtype=torch.float32).view(SHAPE)
    return torch.equal(model.weight, expected)


@pytest.fixture
def file(tmp_path, monkeypatch):
    for module in (checkpoint, identify):
        monkeypatch.setattr(module, "SETTLED_S", 0.0)  # the ctime of a new file cannot be set
    return written(tmp_path / "weights")


@pytest.fixture
def settings(directory, monkeypatch):
    monkeypatch.setenv("WOOLY_AUTOSTART", "0")
    monkeypatch.setattr(fallback, "_warned", set())
    return Settings("plain", "1.0", Fallback(True, "", LOG), directory, timeout_s=30, min_bytes=MIN_BYTES)


@pytest.fixture
def held_back(monkeypatch):
    """Hashing that goes on only when the event is set; the second event tells that it has begun."""
    go_on, begun = threading.Event(), threading.Event()
    hash_files = identify.hash_files

    def waiting(paths, *, progress):
        progress(1)  # as hashing reports that it has begun
        begun.set()
        assert go_on.wait(30)
        return hash_files(paths, progress=progress)

    monkeypatch.setattr(identify, "hash_files", waiting)
    yield go_on, begun
    go_on.set()


def test_the_model_is_loaded_while_the_checkpoint_is_hashed(sessions, file, settings, held_back):
    """Hashing ends only after the load: they overlap. The next process attaches, and hashes nothing."""
    status = sessions().status
    first, second = Steps(file, while_loading=held_back[0].set), Steps(file)
    models = [load(steps, settings) for steps in (first, second)]
    assert (first.calls, second.calls) == (["load_to_publish", "published"], ["attach", "attached"])
    assert all(map(right, models))
    assert [model.state for model in status().models] == ["committed"]


def test_of_two_at_once_one_loads(sessions, file, settings, held_back):
    """The second waits for the first's digest, and then for its model: it never loads."""
    status = sessions().status
    first, second, found = Steps(file), Steps(file), {}
    one = threading.Thread(target=lambda: found.update(one=load(first, settings)))
    one.start()
    assert held_back[1].wait(30)
    two = threading.Thread(target=lambda: found.update(two=load(second, settings)))
    two.start()
    wait_until(lambda: len(status().clients) == 3, "the second to be connected")
    held_back[0].set()
    one.join(30)
    two.join(30)
    assert (first.calls, second.calls) == (["load_to_publish", "published"], ["attach", "attached"])
    assert all(map(right, found.values()))
    found.clear()


def test_a_model_that_is_there_under_another_name_replaces_the_loaded_one(sessions, file, settings, tmp_path):
    """A copy of the checkpoint, whose key is known after hashing: the loaded model is dropped, the shared one used."""
    original = load(Steps(file), settings)
    copy = Steps(written(tmp_path / "copy"), "a copy")
    model = load(copy, settings)
    assert copy.calls == ["load_to_publish", "discard", "attach", "attached"]
    assert right(model)
    assert len(sessions().status().models) == 1
    del original


def test_a_model_of_the_same_name_is_waited_for(sessions, file, settings, tmp_path):
    """The store is likely to have it: the checkpoint is hashed first, and nothing is loaded in vain."""
    original = load(Steps(file), settings)
    copy = Steps(written(tmp_path / "copy"))
    assert right(load(copy, settings))
    assert copy.calls == ["attach", "attached"]
    assert sessions().status().totals.resident_bytes
    del original


def test_a_file_that_changes_during_the_load_is_not_published(sessions, file, settings, caplog):
    """The bytes that were loaded are not those that were hashed: the model stays private, and nobody gets it."""
    steps = Steps(file, while_loading=lambda: written(file, first=5))
    model = load(steps, settings)
    assert steps.calls == ["load_to_publish", "left_private"]
    assert right(model)
    status = sessions().status()
    assert (status.models, status.counters.fallbacks) == ((), 1)
    assert "changed while it was" in caplog.text


def test_a_fresh_file_is_hashed_first(sessions, tmp_path, settings, monkeypatch):
    """A change of it might not show in its identity, so that other bytes could be loaded than hashed."""
    order = []
    hash_files = identify.hash_files
    monkeypatch.setattr(identify, "hash_files", lambda *a, **k: (hash_files(*a, **k), order.append("hashed"))[0])
    steps = Steps(written(tmp_path / "weights"), while_loading=lambda: order.append("loaded"))
    assert right(load(steps, settings))
    assert order == ["hashed", "loaded"]
    assert sessions().status().models


def test_a_checkpoint_that_cannot_be_hashed_leaves_the_model_private(sessions, file, settings, monkeypatch):
    """The model is loaded by then: it is kept, and not loaded again."""

    def refused(_, *, progress):
        progress(1)
        raise CheckpointError("cannot read it: Input/output error")

    monkeypatch.setattr(identify, "hash_files", refused)
    steps = Steps(file)
    assert right(load(steps, settings))
    assert steps.calls == ["load_to_publish", "left_private"]
    assert sessions().status().counters.fallbacks == 1


def test_a_load_that_fails_ends_the_hashing_and_lets_others_load(sessions, file, settings, held_back):
    """The error is the engine's own; the turn and the publication end with the session."""
    status = sessions().status

    def fail():
        assert held_back[1].wait(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(Steps(file, while_loading=fail), settings)
    held_back[0].set()
    wait_until(lambda: len(status().clients) == 1, "the session to end")
    steps = Steps(file)
    assert right(load(steps, settings))
    assert steps.calls == ["load_to_publish", "published"]
    gc.collect()
