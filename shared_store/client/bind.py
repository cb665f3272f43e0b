"""Binding: a model built of placeholders becomes the model of a manifest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from shared_store.client.mapped import MappedBlobs
from shared_store.client.placeholders import Placeholders
from shared_store.client.reach import tensors_from
from shared_store.client.tensors import NamedTensor, tensors_of
from shared_store.client.views import StorageKey, storage_key, view_of
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
    with torch._C.DisableTorchFunctionSubclass():  # engines' parameters are subclasses that want to see every access
        modules = dict(model.named_modules(remove_duplicate=False))
        held = list(tensors_of(modules))
        origins: dict[StorageKey, list[_Origin]] = defaultdict(list)
        for named in held:
            if key := storage_key(named.tensor):
                origins[key].append(_Origin(named.tensor))
        mapped = {index for index in range(len(manifest.blobs)) if blobs.shared(index, min_bytes)}
        mapped -= {entry.blob for entry in manifest.tensors if entry.host}
        _drop_unnamed(held, modules, manifest)
        made = _bind_named(modules, manifest, _storages(manifest, blobs, mapped))
        if _others_hold(placeholders, origins):
            _bring_along(model, placeholders, origins)
    mapped_bytes = sum(manifest.blobs[index].nbytes for index in mapped)
    return Bound(mapped_bytes, manifest.nbytes - mapped_bytes, made)


def measure(model: nn.Module, blobs: MappedBlobs) -> Bound:
    """What of a model is mapped and what is private now, by where its tensors lie and not by what was meant."""
    storages: dict[StorageKey, int] = {}
    tensors = 0
    for _, tensor in tensors_from(model):
        if (key := storage_key(tensor)) is not None:
            storages[key] = tensor.untyped_storage().nbytes()
            tensors += 1
    mapped = sum(nbytes for (_, address), nbytes in storages.items() if blobs.covers(address))
    return Bound(mapped, sum(storages.values()) - mapped, tensors)


def _storages(manifest: Manifest, blobs: MappedBlobs, mapped: Collection[int]) -> list[torch.UntypedStorage]:
    """The bytes of each blob: mapped, or copied to the device or to the host. Each is a storage of its own."""
    on_host = {entry.blob for entry in manifest.tensors if entry.host}
    found = []
    for index in range(len(manifest.blobs)):
        if index in mapped:
            found.append(blobs.storage(index))
        elif index in on_host:
            found.append(blobs.bytes(index).to("cpu", copy=True).untyped_storage())
        else:
            found.append(blobs.bytes(index).clone().untyped_storage())
    return found


def _bind_named(modules: Mapping[str, nn.Module], manifest: Manifest, storages: Sequence[torch.UntypedStorage]) -> int:
    """Give the modules what the manifest names; returns how many tensors that made."""
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
    return len(made)


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


def _others_hold(placeholders: Placeholders, origins: Mapping[StorageKey, Sequence[_Origin]]) -> bool:
    """Whether a tensor that no module names is left in memory that named ones lay in, or on a placeholder.

    Told by the reference counts of the storages, which is quicker than a walk through all that the model reaches.
    """
    first = ((key, it[0].before, 0) for key, it in origins.items() if key not in placeholders)
    made = ((key, element, 1) for key, element in placeholders.elements())
    return any(
        torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > len(origins.get(key, ())) + kept + _ASKING
        for key, tensor, kept in chain(first, made)
    )


_ASKING = 1
"""References to a storage that asking for their number makes."""


def _bring_along(model: nn.Module, placeholders: Placeholders, origins: Mapping[StorageKey, list[_Origin]]) -> None:
    """Let references outside of the modules' names follow the tensor that they were made of.

    Real values that no bound tensor accounts for stay: the constructor computed them. Placeholders must not stay.
    """
    for step, tensor in tensors_from(model):
        key = storage_key(tensor)
        placeholder = placeholders.is_one(tensor)
        if key is None or not tensor.numel() or (key not in origins and not placeholder):
            continue
        found = [new for it in origins.get(key, ()) if (new := it.follow(tensor, placeholder=placeholder)) is not None]
        if len({(storage_key(new), *_geometry(new)) for new in found}) > 1:
            raise BindingError(f"{step.path} could be any of {len(found)} tensors that were made of the same memory")
        real = placeholders.written(tensor) if placeholder else None
        if found:
            tensor.data = found[0]
        elif real is not None:
            tensor.data = real
        elif placeholder:
            raise BindingError(f"{step.path} was left on a placeholder: binding does not reach what it was made of")


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
        if kind == entry.kind:
            group[entry.name] = tensor
        else:
            group.pop(entry.name, None)
    if entry.kind == "buffer":
        if entry.persistent:
            module._non_persistent_buffers_set.discard(entry.name)
        else:
            module._non_persistent_buffers_set.add(entry.name)


def _drop_unnamed(held: Iterable[NamedTensor], modules: Mapping[str, nn.Module], manifest: Manifest) -> None:
    named = {(entry.module, entry.name) for entry in manifest.tensors}
    for tensor in held:
        if (tensor.module, tensor.name) not in named:
            for group in _groups(modules[tensor.module]).values():
                group.pop(tensor.name, None)
