"""Publishing some of a model's tensors leaves the others alone, and out of the manifest."""

import torch
from support.torch_models import KEY, MIN_BYTES, attach, grant
from torch import nn

from shared_store.memory import MemfdBackend
from shared_store.torch.mapping_registry import mapping_of
from shared_store.torch.publish import Publication, publish


class Partly(nn.Module):
    """Some weights, one of them on no device yet, and a table that no state dict has."""

    def __init__(self):
        super().__init__()
        self.taken = nn.Parameter(torch.arange(4096.0))
        self.left = nn.Parameter(torch.arange(4096.0) + 1)
        self.promised = nn.Parameter(torch.empty(4096, device="meta"))
        self.register_buffer("table", torch.arange(4096.0) + 2, persistent=False)


def test_only_selected_tensors_are_published(sessions):
    """The others keep their memory, even those that could not be published."""
    model = Partly()
    before = dict(model.named_buffers()) | dict(model.named_parameters())
    addresses = {name: it.data_ptr() for name, it in before.items()}
    session = sessions()
    grant(session)
    publication = Publication(KEY, "model", "test", "cpu", {})
    manifest, *_ = publish(
        session, publication, model, MemfdBackend(), min_bytes=MIN_BYTES, select=lambda named: named.name == "taken"
    )
    assert [entry.path for entry in manifest.tensors] == ["taken"]
    assert manifest.nbytes == 4096 * 4
    assert mapping_of(model.taken) is not None
    assert torch.equal(model.taken, torch.arange(4096.0))
    for name in ("left", "promised", "table"):
        tensor = getattr(model, name)
        assert tensor is before[name]
        assert tensor.data_ptr() == addresses[name]
        assert mapping_of(tensor) is None
    read, _ = attach(sessions())
    assert read == manifest
