"""Attaching: set a manifest's tensors on a model of meta tensors, as transformers sets loaded ones."""

from __future__ import annotations

import torch
from torch import nn

from shared_store.base.errors import BindingError
from shared_store.base.manifest import Manifest
from shared_store.torch.bind import Bound
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.views import view_of


def attach(model: nn.Module, manifest: Manifest, mapped: MappedModel, *, min_bytes: int) -> Bound:
    """Set every tensor of a manifest, under every name that it has there.

    Args:
        model: built as the publisher's was. Its other tensors are left alone.
        manifest: the tensors that the publisher loaded.
        mapped: its blobs, mapped for reading.
        min_bytes: smaller blobs are copied instead of mapped.

    Raises:
        BindingError: the model lacks a tensor of the manifest. The model is unchanged.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in manifest.tensors:
        if entry.module not in modules or not hasattr(modules[entry.module], entry.name):
            raise BindingError(f"{entry.path}: the model has no such tensor")
    shared = [mapped.shared(index, min_bytes) for index in range(len(manifest.blobs))]
    storages = [
        mapped.storage(index) if is_shared else mapped.bytes(index).clone().untyped_storage()
        for index, is_shared in enumerate(shared)
    ]
    made: dict[int, torch.Tensor] = {}
    for entry in manifest.tensors:
        tensor = made.get(entry.alias)
        if tensor is None:
            tensor = view_of(storages[entry.blob], entry)
            if entry.kind == "parameter":
                tensor = nn.Parameter(tensor, requires_grad=entry.requires_grad)
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark of loaded tensors
            made[entry.alias] = tensor
        setattr(modules[entry.module], entry.name, tensor)
    mapped_bytes = sum(blob.nbytes for blob, is_shared in zip(manifest.blobs, shared, strict=True) if is_shared)
    return Bound(mapped_bytes, manifest.nbytes - mapped_bytes, len(made))
