"""The load sequence with a plain torch module in place of an engine: attach, publish, or fall back, against a store."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time

import msgspec
import pytest
import torch
from support.torch_models import MIN_BYTES
from support.waiting import is_segment, wait_until
from torch import nn

from shared_store.base.errors import StoreUnavailableError, UnsupportedError
from shared_store.client.identify import Checkpoint
from shared_store.client.session import Session
from shared_store.torch import fallback
from shared_store.torch.bind import bind, measure
from shared_store.torch.fallback import Fallback
from shared_store.torch.load import Settings, load
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.steps import Description, Identity, Loaded

ADVICE = "Set nothing to make this an error."
LOG = logging.getLogger("load-test")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(256, 256), requires_grad=False)


class Steps:
    """Steps that record the order in which they are called."""

    def __init__(self, file, *, refuse=None, after_binding=lambda: None):
        self.file, self.refuse, self.after_binding = file, refuse, after_binding
        self.calls = []

    name = "plain model"
    loads_ahead = False

    def prepare(self):
        self.calls.append("prepare")

    @contextlib.contextmanager
    def sharing(self):
        self.calls.append("enter")
        yield
        self.calls.append("exit")

    def identify(self):
        self.calls.append("identify")
        return Identity(torch.device("cpu"), Checkpoint([("weights", self.file)]), {"engine": "plain"})

    def attach(self, manifest, mapped):
        self.calls.append("attach")
        with Placeholders(MIN_BYTES) as placeholders:
            model = Model()
        return Loaded(model, [model]), bind(model, manifest, mapped, placeholders, min_bytes=MIN_BYTES)

    def load_to_publish(self):
        self.calls.append("load_to_publish")
        model = self._read()
        return Loaded(model, [model])

    def discard(self, loaded):
        self.calls.append("discard")
        loaded.model.weight.data = torch.empty(0)

    def describe(self, loaded):
        self.calls.append("describe")
        if self.refuse:
            raise self.refuse
        return Description({"rows": loaded.model.weight.shape[0]})

    def bound(self, shared):
        self.calls.append("published" if shared.published else "attached")
        self.after_binding()
        return measure(shared.loaded.model, shared.mapped)

    def left_private(self, _):
        self.calls.append("left_private")

    def load_stock(self):
        self.calls.append("load_stock")
        return [self._read()]

    def _read(self):
        model = Model()
        model.weight.copy_(torch.frombuffer(bytearray(self.file.read_bytes()), dtype=torch.float32).view(256, 256))
        return model


@pytest.fixture
def file(tmp_path):
    """A checkpoint of one file that is old enough for its digest to be remembered."""
    path = tmp_path / "weights"
    path.write_bytes(torch.arange(256 * 256, dtype=torch.float32).numpy().tobytes())
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    return path


@pytest.fixture
def settings(directory, monkeypatch):
    """Settings of a load, by whether falling back is allowed; warnings are those of a new process."""
    monkeypatch.setenv("WOOLY_AUTOSTART", "0")
    monkeypatch.setattr(fallback, "_warned", set())
    return lambda *, allowed=True: Settings(
        "plain", "1.0", Fallback(allowed, ADVICE, LOG), directory, timeout_s=30, min_bytes=MIN_BYTES
    )


def right(result):
    (model,) = result
    return torch.equal(model.weight, torch.arange(256 * 256, dtype=torch.float32).view(256, 256))


PUBLISHED = ["prepare", "enter", "identify", "load_to_publish", "describe", "published", "exit"]
ATTACHED = ["prepare", "enter", "identify", "attach", "attached", "exit"]


def test_the_first_load_publishes_and_the_second_attaches(sessions, file, settings):
    """In the documented order, with equal tensors; each session ends with its model."""
    first, second, status = Steps(file), Steps(file), sessions().status
    models = [load(steps, settings()) for steps in (first, second)]
    assert (first.calls, second.calls) == (PUBLISHED, ATTACHED)
    assert all(right(model) for model in models)
    readers = [client for client in status().clients if client.role == "reader"]
    assert [client.name for client in readers] == ["plain plain model"] * 2
    models.clear()
    gc.collect()
    wait_until(lambda: not [client for client in status().clients if client.role == "reader"], "both to be gone")


def test_a_model_that_cannot_be_published_is_loaded_once_and_stays_private(sessions, file, settings, caplog):
    """Two loads: one warning with the reason, the code and the advice, and two counts."""
    status = sessions().status
    for _ in range(2):
        steps = Steps(file, refuse=UnsupportedError("its tensors are odd"))
        assert right(load(steps, settings()))
        assert steps.calls == [*PUBLISHED[:5], "left_private", "exit"]
    (warning,) = (record.getMessage() for record in caplog.records if record.name == LOG.name)
    assert warning == (
        f"wooly: plain model is loaded the stock way, and not shared: its tensors are odd [unsupported]. {ADVICE}"
    )
    assert status().counters.fallbacks == 2
    assert status().models == ()


def test_without_a_store_it_is_loaded_the_stock_way(file, settings, caplog):
    """Nothing but the preparation comes before that."""
    steps = Steps(file)
    assert right(load(steps, settings()))
    assert steps.calls == ["prepare", "load_stock"]
    (warning,) = (record.getMessage() for record in caplog.records if record.name == LOG.name)
    assert "[store_unavailable]" in warning


def test_where_falling_back_is_not_allowed_the_error_is_raised(sessions, file, settings):
    """It is not counted, and the session is closed: the next load may publish."""
    status = sessions().status
    with pytest.raises(UnsupportedError, match="its tensors are odd"):
        load(Steps(file, refuse=UnsupportedError("its tensors are odd")), settings(allowed=False))
    assert status().counters.fallbacks == 0
    wait_until(lambda: len(status().clients) == 1, "the session to be closed")
    steps = Steps(file)
    assert right(load(steps, settings(allowed=False)))
    assert steps.calls == PUBLISHED


def test_where_falling_back_is_not_allowed_a_missing_store_is_an_error(file, settings):
    with pytest.raises(StoreUnavailableError):
        load(Steps(file), settings(allowed=False))


def test_a_malformed_manifest_closes_the_descriptors(file, settings, store, monkeypatch):
    """The model is loaded the stock way, and no descriptor of its segments stays open."""
    assert store.pid
    publisher = load(Steps(file), settings())
    opened, stock = [], Session.open

    def open_with_malformed_manifest(self, *arguments, **options):
        attached, fds = stock(self, *arguments, **options)
        opened.extend(fds.filenos())
        return msgspec.structs.replace(attached, manifest=b"malformed"), fds

    monkeypatch.setattr(Session, "open", open_with_malformed_manifest)
    steps = Steps(file)
    assert right(load(steps, settings()))
    assert steps.calls[-1] == "load_stock"
    assert opened
    assert not [fd for fd in opened if is_segment(fd)]
    del publisher


@pytest.mark.parametrize("attaching", [False, True])
def test_a_store_that_ends_before_the_report_does_not_cause_a_second_load(
    sessions, store, file, settings, caplog, attaching
):
    """The model is shared by then: it is returned, with a warning that its private bytes were not reported."""
    publisher = load(Steps(file), settings()) if attaching else None
    assert sessions().alive
    steps = Steps(file, after_binding=store.kill)
    assert right(load(steps, settings()))
    assert steps.calls == (ATTACHED if attaching else PUBLISHED)
    said = [record.getMessage() for record in caplog.records if record.name == LOG.name]
    (warning,) = (text for text in said if "could not report the private bytes of plain model" in text)
    assert "[store_unavailable]" in warning
    assert not [text for text in said if "the stock way" in text]
    del publisher
    caplog.clear()  # a record has the error, whose traceback refers to the model
    gc.collect()


def test_pages_that_the_engine_writes_are_reported_after_the_load(sessions, file, settings):
    """The load does not wait for the count: the store hears of copies at once, and of written pages a moment later."""
    status = sessions().status

    class Writing(Steps):
        def bound(self, shared):
            found = super().bound(shared)
            shared.loaded.model.weight.data[0] = 7  # 1 KiB: one page becomes private
            return found

    publisher = load(Steps(file), settings())
    (reader,) = load(Writing(file), settings())

    def private():
        return sorted(client.private_bytes for client in status().clients if client.role == "reader")

    wait_until(lambda: private() == [0, os.sysconf("SC_PAGE_SIZE")], "the written page to be reported")
    assert reader.weight[0, 0] == 7
    assert right(publisher)
