"""Tensors of publisher and readers equal those of the loaded model."""

import gc

import pytest
import torch
from support.programs import finish_program, start_program
from support.torch_models import (
    KEY,
    LARGE,
    MIN_BYTES,
    Ties,
    made_dtypes,
    memory_of,
    parameter,
    publish_model,
    read_model,
)
from torch import nn

from shared_store.base.manifest import ITEM_SIZES


def draw(model):
    """Give every parameter distinct values."""
    with torch.no_grad():
        for number, tensor in enumerate(model.parameters()):
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(number)))


class Loaded(nn.Parameter):
    """A parameter with a weight loader, as engines have them."""


class Kinds(nn.Module):
    """One tensor of each kind that a module can have."""

    def __init__(self):
        super().__init__()
        self.frozen = parameter(64, 64)
        self.trained = parameter(64, 64, grad=True)
        self.small = parameter(3)
        self.scalar = parameter(())
        self.register_buffer("table", torch.arange(4096.0))
        self.register_buffer("cache", torch.arange(4096.0) * 2, persistent=False)
        self.register_buffer("unset", None)
        self.register_parameter("bias", None)
        self.plain = torch.arange(4096) * 3
        self.none_yet = torch.empty(0)
        self.zero = parameter(0, 7)
        self.loaded = Loaded(torch.empty(64, 64), requires_grad=False)
        self.loaded.weight_loader = self.load

    def load(self):
        return "loaded"


class Layouts(nn.Module):
    """Parameters with other strides, offsets or shared memory."""

    def __init__(self):
        super().__init__()
        both = torch.empty(128, 64)
        self.first, self.second = (
            nn.Parameter(both[:64], requires_grad=False),
            nn.Parameter(both[64:], requires_grad=False),
        )
        self.turned = nn.Parameter(torch.empty(64, 96).t(), requires_grad=False)
        self.spread = nn.Parameter(torch.empty(64, 128)[:, ::2], requires_grad=False)
        self.odd = nn.Parameter(torch.empty(5000)[3:4500], requires_grad=False)
        self.repeated = nn.Parameter(torch.zeros(64, 1).expand(64, 64), requires_grad=False)


def equal_ties():
    model = Ties()
    with torch.no_grad():
        model.large_a.fill_(1), model.large_b.fill_(1), model.small_a.fill_(2), model.small_b.fill_(2)
    return model


def held(model):
    """Return every tensor by name and kind."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for kind, group in (("p", module._parameters), ("b", module._buffers), ("a", vars(module))):
            found |= {
                (path, name, kind): it for name, it in group.items() if isinstance(it, torch.Tensor) and it.numel()
            }
    return found


def snapshot(model):
    return {
        name: (it.detach().clone(), it.shape, it.stride(), it.dtype, it.requires_grad)
        for name, it in held(model).items()
    }


def assert_same(model, expected):
    found = held(model)
    assert found.keys() == expected.keys()
    for name, (values, shape, stride, dtype, grad) in expected.items():
        it = found[name]
        assert (it.shape, it.stride(), it.dtype, it.requires_grad) == (shape, stride, dtype, grad), name
        assert torch.equal(it, values), name


@pytest.mark.parametrize("build", [Kinds, Layouts, Ties])
def test_publisher_and_reader_have_the_same_tensors(sessions, build):
    """Values, shapes, strides, dtypes, requires_grad and kinds are those of the loaded model."""
    model = build()
    if build is not Layouts:
        draw(model)
    else:
        for number, tensor in enumerate((model.first, model.second, model.turned, model.spread, model.odd)):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + number)
    expected = snapshot(model)
    publish_model(sessions(), model)
    assert_same(model, expected)
    reader, _ = read_model(sessions(), build)
    assert_same(reader, expected)


def test_modules_are_complete(sessions):
    """Unset names stay None, persistence of buffers stays, and subclasses of Parameter keep their attributes."""
    model = Kinds()
    draw(model)
    publish_model(sessions(), model)
    reader, bound = read_model(sessions(), Kinds)
    for it in (model, reader):
        assert it.bias is None
        assert it.unset is None
        assert it.none_yet.numel() == 0
        assert it.zero.shape == (0, 7)
        assert it._non_persistent_buffers_set == {"cache"}
        assert type(it.loaded) is Loaded
        assert it.loaded.weight_loader() == "loaded"
        assert it.loaded.weight_loader.__self__ is it
    assert bound.private_bytes == 3 * 4 + 4  # `small` and `scalar`
    assert bound.mapped_bytes == 3 * 64 * 64 * 4 + 4096 * (4 + 4 + 8)


def test_views_of_one_storage_share_it(sessions):
    """Two parameters of one storage share a storage in the reader too: a write to it is visible in both."""
    model = Layouts()
    publish_model(sessions(), model)
    reader, _ = read_model(sessions(), Layouts)
    for it in (model, reader):
        assert it.first.untyped_storage().data_ptr() == it.second.untyped_storage().data_ptr()
        assert it.second.data_ptr() == it.first.data_ptr() + 64 * 64 * 4


class Dtypes(nn.Module):
    def __init__(self):
        super().__init__()
        for name in made_dtypes():
            self.register_buffer(name + "_large", torch.empty(8192, dtype=getattr(torch, name)))
            self.register_buffer(name + "_small", torch.empty(2, dtype=getattr(torch, name)))


def test_every_dtype(sessions):
    """Bytes of each dtype are preserved, NaN patterns included."""
    assert len(made_dtypes()) == len(ITEM_SIZES)
    model = Dtypes()
    for number, buffer in enumerate(model.buffers()):
        buffer.view(torch.uint8).random_(
            0, 2 if buffer.dtype is torch.bool else 256, generator=torch.Generator().manual_seed(number)
        )
    expected = {name: (it.view(torch.uint8).clone(), it.dtype) for name, it in model.named_buffers()}
    publish_model(sessions(), model)
    reader, _ = read_model(sessions(), Dtypes)
    for it in (model, reader):
        assert {name: buffer.dtype for name, buffer in it.named_buffers()} == {
            name: d for name, (_, d) in expected.items()
        }
        for name, buffer in it.named_buffers():
            assert torch.equal(buffer.view(torch.uint8), expected[name][0]), name


def test_ties_are_kept_and_none_is_made(sessions):
    """Tied tensors stay one object. Equal but untied ones are separate: a write changes one of them only."""
    model = equal_ties()
    publish_model(sessions(), model)
    reader, _ = read_model(sessions(), Ties)
    for it in (model, reader):
        assert it.head.weight is it.embed.weight
        assert it.alias is it.layer
        addresses = {x.data_ptr() for x in (it.large_a, it.large_b, it.small_a, it.small_b)}
        assert len(addresses) == 4
    with torch.no_grad():
        reader.large_b.add_(10)
        reader.small_b.add_(10)
        model.large_a.add_(20)
    assert reader.large_a.eq(1).all()
    assert reader.large_b.eq(11).all()
    assert reader.small_a.eq(2).all()
    assert reader.small_b.eq(12).all()
    assert model.large_a.eq(21).all()
    assert model.large_b.eq(1).all()
    assert model.small_b.eq(2).all()


OTHER = """
import torch
from pathlib import Path
from support.torch_models import Ties
from support.torch_models import read_model
from shared_store.client.session import Session
with Session.connect(autostart=False) as session:
    model, _ = read_model(session, Ties)
    with torch.no_grad():
        model.large_a.add_(1)
        model.embed.weight.zero_()
    print(model.head.weight is model.embed.weight, model.large_a.unique().tolist(), model.large_b.unique().tolist())
"""


def test_a_write_in_another_process_stays_there(sessions):
    """A reader in another process sees the values, and its in-place writes stay private."""
    model = equal_ties()
    expected = model.embed.weight.detach().clone()
    publish_model(sessions(), model)
    assert finish_program(start_program(OTHER)) == "True [2.0] [1.0]"
    assert model.large_a.eq(1).all()
    assert torch.equal(model.embed.weight, expected)


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.large = nn.ParameterList(parameter(LARGE) for _ in range(3))
        self.small = nn.ParameterList(parameter(2048) for _ in range(3))


def test_repeated_blobs_are_mapped_again_when_large_and_copied_when_small(sessions):
    """The store has repeated bytes once. A reader maps each large occurrence, and copies small ones after the first."""
    model = Repeated()
    with torch.no_grad():
        for it in model.parameters():
            it.fill_(5)
    session = sessions()
    publish_model(session, model)
    anonymous = memory_of("RssAnon")
    reader, bound = read_model(sessions(), Repeated)
    assert bound.mapped_bytes == 3 * LARGE * 4 + 2048 * 4
    assert bound.private_bytes == 2 * 2048 * 4
    assert all(it.eq(5).all() for it in reader.parameters())
    assert memory_of("RssAnon") - anonymous < LARGE * 4
    (status,) = session.status().models
    assert status.bytes == 3 * LARGE * 4 + 3 * 2048 * 4
    assert session.status().totals.resident_bytes <= 2 * LARGE * 4
    del reader
    gc.collect()


def test_blobs_below_the_limit_are_private_at_the_publisher_too(sessions):
    """Tensors that are small enough for engines to write to stay private."""
    model = Kinds()
    draw(model)
    before = model.small.data_ptr()
    _, _, bound = publish_model(sessions(), model, KEY, min_bytes=MIN_BYTES)
    assert model.small.data_ptr() == before
    assert bound.private_bytes == 3 * 4 + 4
