"""Binding: a model built of placeholders becomes the model of a manifest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shared_store.client.mapped import MappedBlobs
from shared_store.client.placeholders import Placeholders
from shared_store.client.reach import tensors_from
from shared_store.client.tensors import named_tensors
from shared_store.client.views import storage_key, view_of
from shared_store.errors import BindingError
from shared_store.manifest import Manifest, TensorEntry


@dataclass(frozen=True)
class Bound:
    """What binding did: bytes mapped and bytes copied, and how many tensors of the model are shared."""

    mapped_bytes: int
    private_bytes: int
    tensors: int


def bind(
    model: nn.Module, manifest: Manifest, blobs: MappedBlobs, placeholders: Placeholders, *, min_bytes: int
) -> Bound:
    """Give a model exactly the tensors of a manifest.

    Tensors keep their objects, with subclass and attributes, where the module has one: references to them that engines
    keep elsewhere stay right, and references to their memory follow. What the manifest does not name goes; what the
    module lacks appears.

    Args:
        model: built as the publisher's was, so that its modules have the same paths.
        manifest: what it is to become.
        blobs: mapped for reading.
        placeholders: the register of those that the model was built of; none of them is left in the end.
        min_bytes: blobs below this size are copied.

    Raises:
        BindingError: a module of the manifest is missing, or something would stay a placeholder; it is named.
    """
    origins: dict[tuple[str, int], list[_Origin]] = defaultdict(list)
    for held in named_tensors(model):
        if key := storage_key(held.tensor):
            origins[key].append(_Origin(held.tensor))
    modules = dict(model.named_modules(remove_duplicate=False))
    storages = [blobs.bytes(index) for index in range(len(manifest.blobs))]
    on_host = {entry.blob for entry in manifest.tensors if entry.host}
    mapped = private = 0
    for index, blob in enumerate(manifest.blobs):
        if index in on_host:
            storages[index] = storages[index].to("cpu", copy=True)
            private += blob.nbytes
        elif blobs.shared(index, min_bytes):
            mapped += blob.nbytes
        else:
            storages[index] = storages[index].clone()
            private += blob.nbytes
    _drop_unnamed(model, modules, manifest)
    made: dict[int, torch.Tensor] = {}
    taken: dict[int, int] = {}
    # Parameters first: a tensor that is also somebody's attribute is a Parameter in both places.
    for entry in sorted(manifest.tensors, key=lambda entry: entry.kind != "parameter"):
        module = modules.get(entry.module)
        if module is None:
            raise BindingError(f"{entry.path}: the model has no module {entry.module!r}")
        tensor = made.get(entry.alias)
        if tensor is None:
            old = _groups(module)[entry.kind].get(entry.name)
            if old is not None and taken.setdefault(id(old), entry.alias) != entry.alias:
                old = _twin(old)  # one object here, two at the publisher
            tensor = made[entry.alias] = _become(old, view_of(storages[entry.blob], entry), entry)
        _hold(module, entry, tensor)
    _bring_along(model, placeholders, origins)
    return Bound(mapped, private, len(made))


def measure(model: nn.Module, blobs: MappedBlobs) -> Bound:
    """What of a model is mapped and what is private now, by where its tensors lie and not by what was meant."""
    storages: dict[tuple[str, int], int] = {}
    tensors = 0
    for _, tensor in tensors_from(model):
        if (key := storage_key(tensor)) is not None:
            storages[key] = tensor.untyped_storage().nbytes()
            tensors += 1
    mapped = sum(nbytes for (_, address), nbytes in storages.items() if blobs.covers(address))
    return Bound(mapped, sum(storages.values()) - mapped, tensors)


class _Origin:
    """A tensor that the model named, and where it lay before it was bound. Keeps that memory, and so its address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.before = tensor.detach()

    def follow(self, other: torch.Tensor, *, placeholder: bool) -> torch.Tensor | None:
        """Where a tensor that lay in the same memory lies now; None where that cannot be told."""
        new, old = self.tensor.detach(), self.before
        if storage_key(new) == storage_key(old) or new.shape != old.shape or other.dtype != old.dtype:
            return None
        if placeholder:  # all of its parts are at one address, so only another name of the whole can be told
            return new if other.shape == old.shape and other._base is None else None
        if _geometry(other) == _geometry(old):
            return new
        shift = other.storage_offset() - old.storage_offset()
        inside = shift >= 0 and shift + _span(other) <= _span(old)
        if not inside or new.stride() != old.stride() or new.dtype != old.dtype:
            return None
        return new.as_strided(other.shape, other.stride(), new.storage_offset() + shift)


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _bring_along(
    model: nn.Module, placeholders: Placeholders, origins: Mapping[tuple[str, int], list[_Origin]]
) -> None:
    """Let references outside of the modules' names follow the tensor that they were made of.

    Real values that no bound tensor accounts for stay: the constructor computed them. Placeholders must not stay.
    """
    for path, tensor in tensors_from(model):
        key = storage_key(tensor)
        placeholder = placeholders.is_one(tensor)
        if key is None or not tensor.numel() or (key not in origins and not placeholder):
            continue
        found = [new for it in origins.get(key, ()) if (new := it.follow(tensor, placeholder=placeholder)) is not None]
        if len({(storage_key(new), *_geometry(new)) for new in found}) > 1:
            raise BindingError(f"{path} could be any of {len(found)} tensors that were made of the same memory")
        real = placeholders.written(tensor) if placeholder else None
        if found:
            tensor.data = found[0]
        elif real is not None:
            tensor.data = real
        elif placeholder:
            raise BindingError(f"{path} was left on a placeholder: binding does not reach what it was made of")


def _become(old: torch.Tensor | None, view: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    if old is None or not old.is_leaf:
        old = nn.Parameter(view, requires_grad=False) if entry.kind == "parameter" else view
    else:
        old.requires_grad_(False)
        old.data = view
    return old.requires_grad_(entry.requires_grad)


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.Tensor._make_subclass(type(tensor), tensor.data, False)
    twin.__dict__.update(tensor.__dict__)
    return twin


def _groups(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Where a module holds tensors, by the kind of tensor."""
    return {"parameter": module._parameters, "buffer": module._buffers, "attribute": module.__dict__}


def _hold(module: nn.Module, entry: TensorEntry, tensor: torch.Tensor) -> None:
    for kind, group in _groups(module).items():
        if kind != entry.kind:
            group.pop(entry.name, None)
    _groups(module)[entry.kind][entry.name] = tensor
    if entry.kind == "buffer":
        if entry.persistent:
            module._non_persistent_buffers_set.discard(entry.name)
        else:
            module._non_persistent_buffers_set.add(entry.name)


def _drop_unnamed(model: nn.Module, modules: dict[str, nn.Module], manifest: Manifest) -> None:
    named = {(entry.module, entry.name) for entry in manifest.tensors}
    for held in list(named_tensors(model)):
        module = modules[held.module]
        if (held.module, held.name) not in named:
            for group in _groups(module).values():
                group.pop(held.name, None)
