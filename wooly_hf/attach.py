"""Attaching: a model of meta tensors gets the loaded tensors of a manifest, as transformers would have set them."""

from __future__ import annotations

import torch
from torch import nn

from shared_store.base.errors import BindingError
from shared_store.base.manifest import Manifest
from shared_store.torch.bind import Bound
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.views import view_of


def attach(model: nn.Module, manifest: Manifest, blobs: MappedModel, *, min_bytes: int) -> Bound:
    """Set every tensor of a manifest, under every name that it has there.

    Args:
        model: built as the publisher's was; other tensors of it stay as they are.
        manifest: what the publisher's loading set.
        blobs: mapped for reading.
        min_bytes: blobs below this size are copied.

    Raises:
        BindingError: a module of the manifest is missing. The model is as it was.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in manifest.tensors:
        if entry.module not in modules or not hasattr(modules[entry.module], entry.name):
            raise BindingError(f"{entry.path}: the model has no such tensor")
    shared = [blobs.shared(index, min_bytes) for index in range(len(manifest.blobs))]
    storages = [
        blobs.storage(index) if mapped else blobs.bytes(index).clone().untyped_storage()
        for index, mapped in enumerate(shared)
    ]
    made: dict[int, torch.Tensor] = {}
    for entry in manifest.tensors:
        tensor = made.get(entry.alias)
        if tensor is None:
            tensor = view_of(storages[entry.blob], entry)
            if entry.kind == "parameter":
                tensor = nn.Parameter(tensor, requires_grad=entry.requires_grad)
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark of what was loaded
            made[entry.alias] = tensor
        setattr(modules[entry.module], entry.name, tensor)
    mapped_bytes = sum(blob.nbytes for blob, mapped in zip(manifest.blobs, shared, strict=True) if mapped)
    return Bound(mapped_bytes, manifest.nbytes - mapped_bytes, len(made))
