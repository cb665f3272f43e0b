"""A model built of placeholders becomes the published one, with all references to its tensors."""

import collections
import copy
import dataclasses
import functools
import gc
import pickle
import weakref

import pytest
import torch
from support.torch_models import KEY, attach, mapped_segments, publish_model, read_model
from support.waiting import open_fds, open_segments
from torch import nn

from shared_store.base.errors import BindingError
from shared_store.torch.bind import bind
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.reach import tensors_from

SIDE = 64


def weight(*shape):
    return nn.Parameter(torch.empty(*shape or (SIDE, SIDE)), requires_grad=False)


class Base(nn.Module):
    """A large and a small parameter, and a large and a small buffer, with distinct values in the publisher."""

    def __init__(self):
        super().__init__()
        self.large = weight()
        self.small = weight(4)
        self.register_buffer("table", torch.ones(SIDE, SIDE))
        self.register_buffer("scale", torch.ones(4))

    def load(self):
        with torch.no_grad():
            for number, it in enumerate((self.large, self.small, self.table, self.scale)):
                it.copy_(torch.arange(it.numel()).view(it.shape) + 1000 * number)
        return self


class Slots:
    __slots__ = ("__private", "kept")

    def __init__(self, tensor):
        self.kept = tensor
        self.__private = tensor

    def both(self):
        return [self.kept, self.__private]


class Names(dict):
    """A dict with an attribute."""


@dataclasses.dataclass
class Config:
    scale: torch.Tensor


def with_defaults(tensor):
    def function(first=tensor, *, second=tensor):
        return [first, second]

    return function


def decorated(tensor):
    def function():
        return [function.tensor]

    function.tensor = tensor
    return function


def names_with(tensor):
    names = Names()
    names.tensor = tensor
    return names


WAYS = {
    "list": (lambda t: [t], lambda held: held),
    "nested": (lambda t: {"a": [(t,)]}, lambda held: [held["a"][0][0]]),
    "deque": (lambda t: collections.deque([t]), list),
    "set": (lambda t: {t}, list),
    "attribute of a dict": (names_with, lambda held: [held.tensor]),
    "slots": (Slots, Slots.both),
    "closure": (lambda t: lambda: [t], lambda held: held()),
    "defaults": (with_defaults, lambda held: held()),
    "function attribute": (decorated, lambda held: held()),
    "partial": (lambda t: functools.partial(list, [t]), lambda held: held()),
    "partial keyword": (lambda t: functools.partial(dict, t=t), lambda held: [held()["t"]]),
    "dataclass": (Config, lambda held: [held.scale]),
    "bound method": (lambda t: Slots(t).both, lambda held: held()),
    "method of the tensor": (lambda t: t.detach, lambda held: [held()]),
    "hidden module": (lambda t: [nn.ParameterList([t])], lambda held: list(held[0])),
}


class References(Base):
    """Every kind of reference to each tensor, and to its memory, once."""

    def __init__(self):
        super().__init__()
        self.held = {
            (way, same, name): make(getattr(self, name) if same else getattr(self, name).data)
            for way, (make, _) in WAYS.items()
            for same in (True, False)
            for name in ("large", "small", "table", "scale")
        }


def test_references_follow(sessions):
    """References of other objects to a tensor, or to its memory, are in the store's memory in publisher and reader."""
    model = References().load()
    publish_model(sessions(), model)
    wrong = []
    for who in (model, read_model(sessions(), References)[0]):
        for (way, same, name), held in who.held.items():
            expected = getattr(Base().load(), name)
            found = WAYS[way][1](held)
            assert found
            wrong += [
                (type(who).__name__, way, same, name)
                for it in found
                if it.data_ptr() != getattr(who, name).data_ptr() or not torch.equal(it, expected)
            ]
    assert not wrong


class Halves(Base):
    """References to parts of computed buffers."""

    def __init__(self):
        super().__init__()
        self.parts = [*self.table.chunk(2), self.table.t(), self.scale[1:3]]


def test_views_of_computed_tensors_follow(sessions):
    """A view of a table becomes the same view of the published table, which loading had changed."""
    model = Halves().load()
    publish_model(sessions(), model)
    reader, _ = read_model(sessions(), Halves)
    for it in (model, reader):
        assert torch.equal(it.parts[0], it.table[:32])
        assert torch.equal(it.parts[1], it.table[32:])
        assert torch.equal(it.parts[2], it.table.t())
        assert torch.equal(it.parts[3], it.scale[1:3])
        assert it.parts[1].data_ptr() == it.table[32:].data_ptr()


class Computed(Base):
    """A list of computed tensors that no module names."""

    def __init__(self):
        super().__init__()
        self.known = [torch.arange(4096.0)]
        written = torch.empty(SIDE, SIDE)
        self.written = [written]
        written.data.fill_(7)


def test_unnamed_values_of_the_constructor_stay(sessions):
    """Unnamed tensors keep the values that the constructor computed, also those that it wrote to a placeholder."""
    publish_model(sessions(), Computed().load())
    reader, _ = read_model(sessions(), Computed)
    assert torch.equal(reader.known[0], torch.arange(4096.0))
    assert reader.written[0].eq(7).all()


class Leftover(Base):
    def __init__(self):
        super().__init__()
        self.holder = Config({"deep": [torch.empty(SIDE, SIDE)]})


class Transposed(Base):
    def __init__(self):
        super().__init__()
        self.holder = [self.large.t()]


class Chunked(Base):
    def __init__(self):
        super().__init__()
        whole = torch.empty(3 * SIDE, SIDE)
        self.q, self.k, self.v = (nn.Parameter(part, requires_grad=False) for part in whole.chunk(3))
        self.holder = [self.q.data]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Leftover, r"holder\.scale\['deep'\]\[0\] was left on a placeholder"),
        (Transposed, r"holder\[0\] was left on a placeholder"),
        (Chunked, r"holder\[0\] could be any of 3 tensors"),
    ],
)
def test_a_reference_that_cannot_follow_is_an_error_that_names_it(sessions, build, message):
    """A placeholder whose weight is ambiguous is neither left nor guessed."""
    publish_model(sessions(), build().load())
    with pytest.raises(BindingError, match=message):
        read_model(sessions(), build)


class Repacked(Base):
    """Loading removes names, adds names, and changes their kind, shape or dtype."""

    def process(self):
        del self.small
        self.packed = nn.Parameter(self.large.detach().reshape(-1).to(torch.bfloat16), requires_grad=False)
        self.large = nn.Parameter(self.large.detach()[:32].clone(), requires_grad=False)
        del self.table
        self.table = nn.Parameter(torch.full((SIDE, SIDE), 3.0), requires_grad=True)
        self.workspace = torch.arange(5000)
        self.register_buffer("scale", self.scale.double(), persistent=False)
        return self


def test_the_reader_has_exactly_the_tensors_of_the_manifest(sessions):
    """Tensors that the publisher removed, added or changed are removed, added or changed; no placeholder is left."""
    model = Repacked().load().process()
    publish_model(sessions(), model)
    manifest, blobs = attach(sessions())
    with Placeholders(1 << 12) as placeholders:
        reader = Repacked()
    assert any(placeholders.is_placeholder(it) for _, it in tensors_from(reader))
    bind(reader, manifest, blobs, placeholders, min_bytes=1 << 12)
    assert not any(placeholders.is_placeholder(it) for _, it in tensors_from(reader))
    assert not hasattr(reader, "small")
    assert {name for name, _ in reader.named_parameters()} == {"large", "packed", "table"}
    assert {name for name, _ in reader.named_buffers()} == {"scale"}
    assert set(reader.state_dict()) == {"large", "packed", "table"}
    for name in ("large", "packed", "table", "scale", "workspace"):
        ours, theirs = getattr(reader, name), getattr(model, name)
        assert torch.equal(ours, theirs), name
        assert (type(ours), ours.dtype, ours.requires_grad) == (type(theirs), theirs.dtype, theirs.requires_grad), name


class Nested(nn.Module):
    def __init__(self, *, inner=True):
        super().__init__()
        self.first = Base()
        if inner:
            self.second = Base()


def test_a_missing_module_is_an_error_that_names_it(sessions):
    model = Nested()
    model.first.load(), model.second.load()
    publish_model(sessions(), model)
    with pytest.raises(BindingError, match=r"second\.large: the model has no module 'second'"):
        read_model(sessions(), lambda: Nested(inner=False))


def test_an_extra_module_ends_up_empty(sessions):
    """A module that the publisher did not have ends without tensors, not with placeholders."""
    model = Nested(inner=False)
    model.first.load()
    publish_model(sessions(), model)
    reader, _ = read_model(sessions(), Nested)
    assert not list(reader.second.parameters())
    assert torch.equal(reader.first.large, model.first.large)


class Outer(nn.Module):
    """A parameter that the parent module has too, as a plain attribute and as a buffer."""

    def __init__(self):
        super().__init__()
        inner = Base()
        inner.large.weight_loader = "kept"
        self.__dict__["shortcut"] = inner.large
        self.register_buffer("also", inner.large)
        self.inner = inner


def test_a_parameter_that_is_also_an_attribute_stays_a_parameter(sessions):
    """Whichever name comes first, the object is the Parameter with the attributes that engines set."""
    model = Outer()
    model.inner.load()
    publish_model(sessions(), model)
    reader, _ = read_model(sessions(), Outer)
    assert type(reader.inner.large) is nn.Parameter
    assert reader.shortcut is reader.inner.large is reader.also
    assert reader.inner.large.weight_loader == "kept"
    assert torch.equal(reader.shortcut, model.inner.large)


class Untied(nn.Module):
    """Tied by the constructor; loading may untie."""

    def __init__(self):
        super().__init__()
        self.a = weight()
        self.a.loader = "kept"
        self.b = self.a
        self.register_buffer("c", torch.ones(SIDE, SIDE))
        self.register_buffer("d", self.c)


def test_tensors_that_loading_untied_are_separate(sessions):
    """One object of the constructor that is two in the publisher becomes two, with the same attributes."""
    model = Untied()
    model.a.fill_(1)
    model.b = nn.Parameter(torch.full((SIDE, SIDE), 2.0), requires_grad=False)
    model.c = torch.full((SIDE, SIDE), 3.0)
    model.d = torch.full((SIDE, SIDE), 4.0)
    publish_model(sessions(), model)
    reader, _ = read_model(sessions(), Untied)
    assert [it.unique().tolist() for it in (reader.a, reader.b, reader.c, reader.d)] == [[1], [2], [3], [4]]
    assert reader.a.loader == reader.b.loader == "kept"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = weight(), weight()


def test_tensors_that_loading_tied_are_one(sessions):
    """Two objects of the constructor that are one in the publisher become one."""
    model = Tied()
    model.a.fill_(1)
    model.b = model.a
    publish_model(sessions(), model)
    reader, _ = read_model(sessions(), Tied)
    assert reader.b is reader.a
    assert reader.a.eq(1).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_private(sessions, duplicate):
    """A deep copy or an unpickled model has private memory, which outlives the original."""
    model = Base().load()
    publish_model(sessions(), model)
    reader, _ = read_model(sessions(), Base)
    copied = duplicate(reader)
    copied.large.add_(1)
    copied.table.add_(1)
    assert torch.equal(reader.large, model.large)
    assert torch.equal(reader.table, model.table)
    ranges = mapped_segments()
    del reader
    gc.collect()
    assert mapped_segments() < ranges
    assert torch.equal(copied.large, model.large + 1)


def test_everything_is_released_with_the_model(sessions):
    """After a reader's model and then the publisher's are deleted, no segment is mapped and none of its fds is open."""
    publisher, reader = sessions(), sessions()
    gc.collect()
    ranges, fds = mapped_segments(), open_fds()
    model = Base().load()
    publish_model(publisher, model)
    published = mapped_segments(), open_fds(), open_segments()
    bound, _ = read_model(reader, Base)
    assert mapped_segments() > published[0]
    assert open_segments() > published[2]
    table, gone = bound.table, weakref.ref(bound)
    del bound
    gc.collect()
    assert gone() is None
    assert mapped_segments() > published[0]  # one tensor keeps its segment mapped
    assert table[1, 1] == 2065
    del table
    gc.collect()
    reader.leave(KEY)  # until then its session retains fds to offer the model to a restarted store
    assert (mapped_segments(), open_fds(), open_segments()) == published
    del model
    gc.collect()
    publisher.leave(KEY)
    assert (mapped_segments(), open_fds(), open_segments()) == (ranges, fds, 0)


def test_a_failed_binding_leaves_nothing(sessions):
    """The mappings of a model that could not be bound are released with it."""
    publisher, reader = sessions(), sessions()
    model = Leftover().load()
    publish_model(publisher, model)
    before = mapped_segments(), open_fds()
    with pytest.raises(BindingError):
        read_model(reader, Leftover)
    gc.collect()
    reader.leave(KEY)
    assert (mapped_segments(), open_fds()) == before
