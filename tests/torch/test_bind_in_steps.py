"""Binding layer by layer: a layer that makes its final tensors itself is bound after that."""

from __future__ import annotations

import pytest
import torch
from support.torch_models import MIN_BYTES, attach, publish_model
from torch import nn

from shared_store.base.errors import BindingError
from shared_store.torch.bind import Binder
from shared_store.torch.placeholders import Placeholders

SIDE = 64


class Packing(nn.Module):
    """Its final weight has another shape and dtype than the one that is loaded, and a kernel refers to it."""

    def __init__(self, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIDE, SIDE, device=device), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(SIDE), requires_grad=False)
        self.kernel = None

    def pack(self, *, rows=SIDE // 2):
        """Post-process: read the weight, and replace it by tensors with other bytes."""
        packed = (self.weight[: 2 * rows] * 2).to(torch.float64).reshape(rows, -1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("table", self.weight.sum(dim=0, keepdim=True).expand(SIDE, -1).contiguous())
        # A kernel object refers to the parameter, a view of it, and another tensor of its memory.
        self.kernel = {"weight": self.weight, "half": self.weight[:4], "data": self.weight.data}


class Model(nn.Module):
    """A layer that packs, under two names, beside one that is plain."""

    def __init__(self, device=None):
        super().__init__()
        self.plain = nn.Parameter(torch.empty(SIDE, SIDE), requires_grad=False)
        self.packing = Packing(device)
        self.again = self.packing

    def load(self):
        with torch.no_grad():
            self.plain.copy_(torch.arange(SIDE * SIDE).view(SIDE, SIDE))
            self.packing.weight.copy_(torch.arange(SIDE * SIDE).view(SIDE, SIDE) + 5000)
        self.packing.pack()
        return self


def binder_of(session, device=None):
    """Return a reader's unbound model, and its binder."""
    manifest, blobs = attach(session)
    with Placeholders(MIN_BYTES) as placeholders:
        model = Model(device)
    return model, Binder(model, manifest, blobs, placeholders, min_bytes=MIN_BYTES)


@pytest.mark.parametrize("device", [None, "meta"])
def test_a_layer_that_packs_is_bound_after_packing(sessions, device) -> None:
    """It packs zeros. Then its registers and its kernel refer to the publisher's tensors."""
    published = Model().load()
    packed, table = published.packing.weight.clone(), published.packing.table.clone()
    publish_model(sessions(), published)
    model, binder = binder_of(sessions(), device)
    binder.bind([model.packing])
    assert torch.equal(model.plain, published.plain)
    binder.materialize(model.packing, torch.device("cpu"))
    assert not model.packing.weight.any()
    model.packing.pack()
    binder.bind_late(model.packing)
    bound = binder.finish()
    assert model.again is model.packing
    assert torch.equal(model.packing.weight, packed)
    assert torch.equal(model.packing.table, table)
    kernel = model.packing.kernel
    assert kernel["weight"] is model.packing.weight
    assert torch.equal(kernel["half"], packed[:4])
    assert {kernel[name].data_ptr() for name in ("weight", "half", "data")} == {model.packing.weight.data_ptr()}
    assert bound.mapped_bytes >= packed.nbytes + table.nbytes


def test_a_layer_that_differs_is_named(sessions) -> None:
    """Other shapes mean that the publisher packed otherwise, so that this kernel would not fit its tensors."""
    publish_model(sessions(), Model().load())
    model, binder = binder_of(sessions())
    binder.bind([model.packing])
    binder.materialize(model.packing, torch.device("cpu"))
    model.packing.pack(rows=SIDE // 4)
    with pytest.raises(BindingError, match=r"again\.weight is \(.* here, and \(.* in the manifest"):
        binder.bind_late(model.packing)


def test_a_late_layer_that_was_forgotten_is_found(sessions) -> None:
    """Its placeholders must not be left."""
    publish_model(sessions(), Model().load())
    model, binder = binder_of(sessions())
    binder.bind([model.packing])
    with pytest.raises(BindingError, match="left on a placeholder"):
        binder.finish()


class Completing(nn.Module):
    """Makes a tensor of its weight after that is bound, as latent attention does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIDE, SIDE), requires_grad=False)

    def complete(self):
        self.turned = nn.Parameter(self.weight.t().contiguous(), requires_grad=False)


def test_a_layer_that_completes_itself_ends_with_the_shared_tensors(sessions) -> None:
    """The tensor that it makes is replaced by the publisher's; if it makes none, that is an error."""
    published = Completing()
    published.weight.data = torch.arange(SIDE * SIDE, dtype=torch.float32).view(SIDE, SIDE)
    published.complete()
    publish_model(sessions(), published)
    for completes in (True, False):
        manifest, blobs = attach(sessions())
        with Placeholders(MIN_BYTES) as placeholders:
            model = Completing()
        binder = Binder(model, manifest, blobs, placeholders, min_bytes=MIN_BYTES)
        binder.bind(completes_itself=lambda module: isinstance(module, Completing))
        assert not hasattr(model, "turned")
        if completes:
            model.complete()
            own = model.turned.data_ptr()
            binder.finish()
            assert model.turned.data_ptr() != own
            assert blobs.covers(model.turned.data_ptr())
            assert torch.equal(model.turned, published.turned)
        else:
            with pytest.raises(BindingError, match="turned is missing here"):
                binder.finish()
