"""Placeholders replace uninitialised memory only; values that a constructor writes are right."""

import copy
import pickle

import pytest
import torch
from support.programs import finish_program, start_program
from torch import nn

from shared_store.base.errors import UnsupportedError
from shared_store.torch.placeholders import Placeholders

MIN = 1 << 12


def storage_bytes(tensor):
    return tensor.untyped_storage().nbytes()


@pytest.fixture
def placeholders():
    with Placeholders(MIN) as active:
        yield active


FORMS = {
    "sizes": lambda: torch.empty(64, 64),
    "tuple": lambda: torch.empty((64, 64)),
    "size": lambda: torch.empty(size=(64, 64)),
    "memory format": lambda: torch.empty(64, 64, memory_format=torch.contiguous_format),
    "not pinned": lambda: torch.empty(64, 64, pin_memory=False),
    "device": lambda: torch.empty(64, 64, device="cpu"),
    "device object": lambda: torch.empty(64, 64, device=torch.device("cpu")),
    "like": lambda: torch.empty_like(torch.ones(64, 64)),
    "like, by name": lambda: torch.empty_like(input=torch.ones(64, 64)),
    "strided": lambda: torch.empty_strided((64, 64), (1, 64)),
    "new": lambda: torch.ones(1).new_empty(64, 64),
    "new, tuple": lambda: torch.ones(1).new_empty((64, 64)),
    "new, size": lambda: torch.ones(1).new_empty(size=(64, 64)),
    "new strided": lambda: torch.ones(1).new_empty_strided((64, 64), (64, 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_uninitialised_factory_makes_one(placeholders, form):
    """Right shape, dtype and device; one element of memory; NaN in every place."""
    made = FORMS[form]()
    assert placeholders.is_placeholder(made)
    assert (made.shape, made.dtype, made.device.type) == ((64, 64), torch.float32, "cpu")
    assert storage_bytes(made) == 4
    assert made.isnan().all()
    assert (len(placeholders), placeholders.avoided_bytes) == (1, 64 * 64 * 4)


@pytest.mark.parametrize(
    ("dtype", "poison"),
    [(torch.int8, 127), (torch.uint64, 2**64 - 1), (torch.bool, True), (torch.int64, 2**63 - 1)],
)
def test_poison_of_dtypes_without_nan(placeholders, dtype, poison):
    """Reads by mistake are visible in integers too."""
    made = torch.empty(MIN, dtype=dtype)
    assert placeholders.is_placeholder(made)
    assert made[17].item() == poison


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64])
def test_poison_of_dtypes_with_nan(placeholders, dtype):
    made = torch.empty(MIN, dtype=dtype)
    assert placeholders.is_placeholder(made)
    assert made[17].to(torch.complex64).isnan()


REAL = {
    "zeros": lambda: torch.zeros(64, 64),
    "ones": lambda: torch.ones(64, 64),
    "full": lambda: torch.full((64, 64), 3.0),
    "arange": lambda: torch.arange(4096.0),
    "rand": lambda: torch.rand(64, 64),
    "tensor": lambda: torch.tensor([[1.0] * 64] * 64),
    "zeros_like": lambda: torch.zeros_like(torch.empty(64, 64)),
    "small": lambda: torch.empty(1023),
    "legacy": lambda: torch.Tensor(64, 64),
}


@pytest.mark.parametrize("form", REAL)
def test_values_and_small_tensors_are_real(placeholders, form):
    """Tensors with values, and those below the limit, have memory."""
    made = REAL[form]()
    assert not placeholders.is_placeholder(made)
    assert storage_bytes(made) == made.numel() * 4


def test_the_limit_is_in_bytes_and_included(placeholders):
    """`min_bytes` counts bytes, not elements, and is the smallest size that is replaced."""
    assert placeholders.is_placeholder(torch.empty(1024))
    assert not placeholders.is_placeholder(torch.empty(MIN - 1, dtype=torch.int8))
    assert placeholders.is_placeholder(torch.empty(MIN, dtype=torch.int8))
    assert not placeholders.is_placeholder(torch.empty(0, 1 << 20))


def test_computed_in_the_constructor(placeholders):
    """A rotary table is right in a module with placeholders."""
    weight = nn.Linear(64, 64).weight
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 64, 2).float() / 64)
    table = torch.outer(torch.arange(128.0), frequencies).cos()
    assert placeholders.is_placeholder(weight)
    with torch._C.DisableTorchFunction():
        expected = torch.outer(torch.arange(128.0), 1.0 / 10000.0 ** (torch.arange(0, 64, 2).float() / 64)).cos()
        assert torch.equal(table, expected)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(64, 64, bias=False),
        lambda: nn.Embedding(100, 64),
        lambda: nn.Conv1d(64, 64, 3, bias=False),
        lambda: nn.Conv2d(32, 32, 3, bias=False),
        lambda: nn.Linear(64, 64, bias=False).requires_grad_(False),
        lambda: nn.ModuleList(copy.deepcopy(nn.Linear(64, 64, bias=False)) for _ in range(3)),
    ],
    ids=["Linear", "Embedding", "Conv1d", "Conv2d", "requires_grad_", "deepcopy"],
)
def test_initialisers_of_modules_allocate_nothing(placeholders, build):
    """Random initial values are not stored: every weight is a placeholder after construction."""
    weights = list(build().parameters())
    assert weights
    assert all(placeholders.is_placeholder(weight) for weight in weights)


def test_norms_are_ones(placeholders):
    """Constant initial values are kept."""
    norm = nn.LayerNorm(4096)
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()
    assert not placeholders.is_placeholder(norm.weight)


WRITES = {
    "fill_": lambda w, x: w.fill_(2).mul_(x),
    "copy_": lambda w, x: w.copy_(2 * x),
    "setitem": lambda w, x: w.__setitem__(slice(None), 2 * x),
    "setitem in parts": lambda w, x: [w.__setitem__(row, 2 * x[row]) for row in range(64)],
    "out": lambda w, x: torch.mul(x, 2, out=w),
    "data": lambda w, x: w.data.copy_(2 * x),
    "detach": lambda w, x: w.detach().copy_(2 * x),
    "init": lambda w, x: nn.init.constant_(w, 2).mul_(x),
    "in place operator": lambda w, x: w.zero_().__iadd__(2 * x),
    "numpy": lambda w, x: w.numpy().__setitem__(slice(None), (2 * x).numpy()),
    "aten": lambda w, x: torch.ops.aten.copy_(w.zero_(), 2 * x),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_makes_it_real_under_all_of_its_names(placeholders, write):
    """The written values are visible in aliases from before and after, also in lists, and in no other tensor."""
    x = torch.arange(4096.0).view(64, 64)
    other = torch.empty(64, 64)
    weight = torch.empty(64, 64)
    before = weight.data
    with torch.no_grad():
        WRITES[write](weight, x)
    after = weight.data
    for alias in (weight, before, after):
        assert torch.equal(torch.stack([alias])[0], 2 * x)
        assert torch.equal(alias, 2 * x)
    assert weight.data_ptr() == before.data_ptr() == after.data_ptr()
    assert placeholders.is_placeholder(other)
    assert other.isnan().all()


def test_a_write_to_a_parameter_is_seen_by_its_tensor(placeholders):
    """`nn.Parameter(x)` is an alias of `x`; its class stays."""
    tensor = torch.empty(64, 64)
    weight = nn.Parameter(tensor)
    nn.init.ones_(weight)
    assert tensor.sum() == 4096
    assert type(weight) is nn.Parameter
    assert weight.requires_grad
    assert not placeholders.is_placeholder(weight)


def test_what_a_part_assignment_leaves_is_poison(placeholders):
    weight = torch.empty(64, 64)
    weight[3] = 1
    assert weight[3].eq(1).all()
    assert weight[4].isnan().all()
    assert not placeholders.is_placeholder(weight)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w[3].fill_(1),
        lambda w: w.view(-1).zero_(),
        lambda w: w.t().copy_(torch.ones(64, 64)),
        lambda w: torch.add(torch.ones(64), 1, out=w[0]),
        lambda w: (old := w.t(), w.fill_(1), old.sum()),
    ],
    ids=["row", "flat", "transposed square", "out", "read through an older view"],
)
def test_a_write_through_a_view_is_refused(placeholders, write):
    """One element does not show which part a view is, so it is an error with that reason, never a wrong value."""
    assert not len(placeholders)
    with pytest.raises(UnsupportedError, match="part or view of shape"):
        write(torch.empty(64, 64))


def test_a_foreign_write_fails_loudly(placeholders):
    """A write that torch's naming does not show fails torch's own check of expanded memory."""
    weight = torch.empty(64, 64)
    with pytest.raises(RuntimeError, match="single memory location"):
        torch._foreach_add_([weight], 1)
    assert placeholders.is_placeholder(weight)
    assert weight.isnan().all()


def test_deepcopy_of_a_buffer_is_a_placeholder_of_its_own(placeholders):
    """A copy is registered too; each gets its own memory when written."""
    weight = torch.empty(64, 64)
    pair = copy.deepcopy([weight, weight])
    assert pair[0] is pair[1]
    assert placeholders.is_placeholder(pair[0])
    pair[0].fill_(1)
    assert placeholders.is_placeholder(weight)
    assert weight.isnan().all()
    assert pickle.loads(pickle.dumps(pair[0])).eq(1).all()


@pytest.mark.parametrize("order", ["device outside", "device inside"])
def test_under_a_device_context(order):
    """`torch.device` as a context makes no difference, whichever is entered first."""
    active, device = Placeholders(MIN), torch.device("cpu")
    with device if order == "device outside" else active, active if order == "device outside" else device:
        assert active.is_placeholder(torch.empty(64, 64))
        assert active.is_placeholder(nn.Linear(64, 64).weight)


@pytest.mark.parametrize("order", ["meta outside", "meta inside"])
def test_meta_stays_meta(order):
    """Meta tensors are left alone."""
    active, device = Placeholders(MIN), torch.device("meta")
    with device if order == "meta outside" else active, active if order == "meta outside" else device:
        made = torch.empty(64, 64)
    assert made.device.type == "meta"
    assert not active.is_placeholder(made)


def test_nested_and_left():
    """The innermost context replaces tensors; outside of all, tensors are real."""
    with Placeholders(MIN) as outer:
        with Placeholders(MIN) as inner:
            within = torch.empty(64, 64)
        between = torch.empty(64, 64)
    outside = torch.empty(64, 64)
    assert inner.is_placeholder(within)
    assert not outer.is_placeholder(within)
    assert outer.is_placeholder(between)
    assert not inner.is_placeholder(outside)
    assert not outer.is_placeholder(outside)


def test_default_dtype_and_requires_grad(placeholders):
    """The default dtype sets dtype and size; a leaf with gradients stays one."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = torch.empty(64, 64, requires_grad=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype is torch.bfloat16
    assert placeholders.avoided_bytes == 64 * 64 * 2
    assert made.requires_grad
    assert made.is_leaf


@pytest.mark.usefixtures("placeholders")
def test_tensors_without_plain_memory_pass():
    """Sparse, meta and lazy tensors are not affected."""
    torch.empty(64, 64)
    assert torch.eye(3).to_sparse().sum() == 3
    assert nn.LazyLinear(4).weight.requires_grad
    assert torch.ones(2, device="meta").add_(1).shape == (2,)


MEASURE = """
import torch
from torch import nn
from support.torch_models import memory_of
from shared_store.torch.placeholders import Placeholders
nn.Linear(8, 8)
before = memory_of("VmHWM")
with Placeholders(1 << 14) as active:
    model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False).requires_grad_(False) for _ in range(4)))
print(active.avoided_bytes, memory_of("VmHWM") - before, sum(p.untyped_storage().nbytes() for p in model.parameters()))
"""


def test_a_gibibyte_takes_no_memory():
    """The peak of a process that builds 1 GiB of weights rises by less than 16 MiB."""
    avoided, peak, storages = map(int, finish_program(start_program(MEASURE)).split())
    assert avoided == 1 << 30
    assert peak < 16 << 20
    assert storages == 4 * 4
