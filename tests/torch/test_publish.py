"""Publishing needs no second copy of a model, and leaves it complete and right if it fails."""

import collections
import gc
import json
import weakref

import pytest
import torch
from support.content import key
from support.programs import finish_program, start_program
from support.torch_models import KEY, MIN_BYTES, Layers, grant, mapped_segments, publish_model, read_model
from support.waiting import open_segments
from torch import nn

from shared_store.base.errors import CommitFailedError, OutOfMemoryError, UnsupportedError
from shared_store.client.session import Session
from shared_store.memory import MemfdBackend
from shared_store.torch.publish import Publication, publish

MIB = 1 << 20


def addresses(model):
    return [it.data_ptr() for it in model.parameters()]


def test_originals_are_freed_one_by_one(sessions):
    """Each original storage is freed before the tensor after the next is copied, whatever refers to its tensors."""
    model = Layers()
    storages = [weakref.ref(layer.untyped_storage()) for layer in model.layers]
    alive = []
    publish_model(sessions(), model, progress=lambda _: alive.append(sum(one() is not None for one in storages)))
    gc.collect()
    assert not any(one() is not None for one in storages)
    model.assert_right()
    assert len(alive) == 5


MEASURE = """
import json, sys, torch
from torch import nn
from support.torch_models import Layers
from support.torch_models import memory_of, publish_model
from shared_store.client.session import Session
from support.mapped import segment_bytes
model = Layers(count=10, mib=128)
with Session.connect(autostart=False) as session:
    loaded, points = memory_of("RssAnon"), []
    def progress(_):
        points.append((memory_of("RssAnon") - loaded, segment_bytes(session.store_pid)))
    publish_model(session, model, progress=progress)
    print(json.dumps([points, memory_of("RssAnon") - loaded]))
"""


def test_the_peak_over_the_loaded_model_is_one_segment(sessions):
    """1.25 GiB are published in segments of an eighth: private and shared memory together rise by at most one."""
    session = sessions()
    points, left = json.loads(finish_program(start_program(MEASURE)))
    # The store's memory counts in whole segments, which are allocated when their first tensor is written.
    peak = max(private + shared for private, shared in points)
    assert points[-1][1] == 10 * 128 * MIB + 2 * MIB
    assert peak <= 160 * MIB + 64 * MIB
    assert left <= -10 * 128 * MIB + 64 * MIB
    assert session.status().totals.resident_bytes == 10 * 128 * MIB + 2 * MIB


def test_a_view_does_not_keep_its_base(sessions):
    """A buffer that is a view of a larger, otherwise unused tensor does not keep that tensor's memory."""
    model = nn.Module()
    whole = torch.arange(1 << 20)
    storage = weakref.ref(whole.untyped_storage())
    model.register_buffer("part", whole[5:100_000])
    del whole
    assert model.part._base is not None
    publish_model(sessions(), model)
    gc.collect()
    assert storage() is None
    assert torch.equal(model.part, torch.arange(5, 100_000))


@pytest.mark.parametrize("moment", [1, 3, 5], ids=["first tensor", "middle", "before commit"])
def test_store_killed_while_publishing(store, directory, moment):
    """The store is killed after the plan: the model and its references are complete, right, writable and private."""
    model = Layers()
    calls = []

    def progress(_):
        calls.append(None)
        if len(calls) == moment:
            store.kill()

    session = Session.connect(directory, autostart=False)
    with pytest.raises(CommitFailedError, match="was loaded, but could not be published"):
        publish_model(session, model, progress=progress)
    session.close()
    model.assert_right()
    model.layers[0].add_(1)
    assert model.held[0][5] == 6
    del model, session  # a session keeps the error that ended it
    gc.collect()
    assert (mapped_segments(), open_segments()) == (0, 0)


def test_commit_refused(sessions):
    """Bytes that changed after they were digested are refused; the model is unchanged."""
    model = Layers()

    def progress(_):
        model.layers[1].data[7] = -1  # still private when the first tensor is done

    session = sessions()
    with pytest.raises(CommitFailedError, match="not accepted"):
        publish_model(session, model, progress=progress)
    assert model.layers[1][7] == -1
    assert model.layers[1][8] == 9
    assert session.status().totals.resident_bytes == 0


def test_interrupted_while_copying(sessions):
    """An exception of another library leaves the model readable."""
    model = Layers()
    calls = []

    def progress(_):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_model(sessions(), model, progress=progress)
    model.assert_right()


def test_over_the_limit(start_store, sessions, store, directory):
    """The store refuses the plan: model and store are unchanged."""
    store.stop()
    start_store(redis_url=f"unix://{directory}/away", max_resident={"cpu": 2 * MIB})
    model = Layers()
    before = addresses(model)
    session = sessions()
    with pytest.raises(OutOfMemoryError, match="limit"):
        publish_model(session, model)
    assert addresses(model) == before
    model.assert_right()
    assert session.status().totals.resident_bytes == 0


def test_blobs_that_another_publisher_committed_meanwhile(sessions):
    """Both planned the same bytes: both models are right, on one copy, and the later publisher's copy is released."""
    one, two = sessions("one"), sessions("two")
    first, second = Layers(), Layers(count=6)
    grant(two, key(2))
    planned = []

    def meanwhile(_):
        if not planned:
            planned.append(publish_model(one, first, key(1)))

    _, mapped, bound = publish(
        two,
        Publication(key(2), "two", "test", "cpu", {}),
        second,
        MemfdBackend(),
        min_bytes=MIN_BYTES,
        progress=meanwhile,
    )
    first.assert_right()
    second.assert_right()
    assert bound.mapped_bytes == 6 * MIB
    del mapped
    planned.clear()
    gc.collect()
    status = one.status()
    # Of the second's segment two layers are in use: it stays whole. The first's has four layers.
    assert status.totals.resident_bytes == (4 + 2) * MIB + (6 + 2) * MIB
    assert sorted(model.unique_bytes for model in status.models) == [0, 2 * MIB]
    first.layers[0].zero_()
    second.assert_right()


def test_equal_models_under_two_keys_take_one_copy(sessions):
    """A publisher all of whose blobs another has committed meanwhile ends without a segment of its own."""
    one, two = sessions(), sessions()
    first, second = Layers(), Layers()
    done = []

    def meanwhile(_):
        if not done:
            done.append(True)
            publish_model(one, first, key(1))

    publish_model(two, second, key(2), progress=meanwhile)
    gc.collect()
    first.assert_right()
    second.assert_right()
    assert one.status().totals.resident_bytes == (4 + 2) * MIB
    reader, _ = read_model(sessions(), Layers, key(2))
    reader.assert_right()
    maps = mapped_segments()
    del second
    gc.collect()
    assert mapped_segments() < maps


class Wrapper(torch.Tensor):
    """A tensor whose bytes are another's."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


UNSUPPORTED = {
    "sparse": (lambda: torch.eye(64).to_sparse(), "layout"),
    "meta": (lambda: torch.empty(64, 64, device="meta"), "is on meta"),
    "wrapper": (lambda: Wrapper(torch.ones(64, 64)), "is a Wrapper"),
    "conjugated": (lambda: torch.ones(64, 64, dtype=torch.complex64).conj(), "conjugated"),
    "negated": (lambda: torch.ones(64, 64, dtype=torch.complex64).conj().imag, "negated"),
    "dtype": (lambda: torch.empty(4096, dtype=torch.bits8), "dtype"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
@pytest.mark.parametrize("held", ["buffer", "attribute"])
def test_unsupported_tensors(sessions, kind, held):
    """A tensor without plain memory is an error that names it, and nothing has changed."""
    make, message = UNSUPPORTED[kind]
    model = nn.Sequential(Layers(), nn.Identity())
    if held == "buffer":
        model[1].register_buffer("odd", make())
    else:
        model[1].odd = make()
    before = addresses(model)
    session = sessions()
    with pytest.raises(UnsupportedError, match=rf"1\.odd .*{message}"):
        publish_model(session, model)
    assert addresses(model) == before
    model[0].assert_right()
    assert session.status().totals.resident_bytes == 0


def test_a_lazy_parameter_is_unsupported(sessions):
    model = nn.Sequential(Layers(), nn.LazyLinear(4))
    with pytest.raises(UnsupportedError, match=r"1\.weight is a UninitializedParameter"):
        publish_model(sessions(), model)


def test_a_lazy_view_beside_the_modules_is_unsupported(sessions):
    """A conjugated reference would lose its conjugation when it is bound: an error, not a wrong value."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.complex64) * 1j)
    model.held = [model.weight.detach().conj()]
    with pytest.raises(UnsupportedError, match="conjugated"):
        publish_model(sessions(), model)
    assert model.held[0][0, 0] == -1j


def test_a_model_without_tensors_is_unsupported(sessions):
    with pytest.raises(UnsupportedError, match="no tensors"):
        publish_model(sessions(), nn.Identity())


def test_a_model_of_buffers_alone(sessions):
    """Parameters are not needed."""
    model = nn.Module()
    model.register_buffer("table", torch.arange(4096))
    publish_model(sessions(), model)
    assert torch.equal(model.table, torch.arange(4096))


@pytest.mark.parametrize("value", [1 << 70, object()], ids=["large number", "object"])
def test_state_that_cannot_be_encoded(sessions, value):
    """It is refused before anything moves."""
    model = Layers()
    before = addresses(model)
    with pytest.raises(UnsupportedError, match="state"):
        publish_model(sessions(), model, KEY, state={"": {"flag": value}})
    assert addresses(model) == before


def test_progress_adds_up(sessions):
    """Every byte is reported once."""
    told = collections.Counter()
    publish_model(sessions(), Layers(), progress=lambda count: told.update(bytes=count))
    assert told["bytes"] == 4 * MIB + 16
