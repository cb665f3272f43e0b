"""References to a model's tensors that no module names: in attention layers, kernel objects, lists, closures.

Binding moves named tensors to other memory. A reference that shares a storage with a named tensor follows it, at the
same offset. Values that the constructor computed in memory of their own are left alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import nn

from shared_store.base.errors import BindingError
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.reach import tensors_from
from shared_store.torch.tensors import NamedTensor
from shared_store.torch.views import StorageKey, storage_key

_FROM_COUNTING = 1
"""References to a storage that counting its references adds."""


class Origin:
    """A named tensor, and its memory before it was bound. Keeps that memory allocated, so that its address stays."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.before = tensor.detach()

    def follow(self, other: torch.Tensor, *, placeholder: bool) -> torch.Tensor | None:
        """Return the new memory of a tensor that shared the old memory; None if it cannot be determined."""
        new, old = self.tensor.detach(), self.before
        if storage_key(new) == storage_key(old) or new.shape != old.shape or other.dtype != old.dtype:
            return None
        if placeholder:  # all parts of a placeholder have one address, so only the whole can be recognised
            return new if other.shape == old.shape and other._base is None else None
        if _geometry(other) == _geometry(old):
            return new
        shift = other.storage_offset() - old.storage_offset()
        inside = shift >= 0 and shift + _span(other) <= _span(old)
        if not inside or new.stride() != old.stride() or new.dtype != old.dtype:
            return None
        return new.as_strided(other.shape, other.stride(), new.storage_offset() + shift)


Origins: TypeAlias = Mapping[StorageKey, Sequence[Origin]]
"""Named tensors before they are bound, by the storage they share."""


def origins_of(named: Iterable[NamedTensor]) -> Origins:
    """Note where named tensors are, before they are bound."""
    origins: dict[StorageKey, list[Origin]] = defaultdict(list)
    for one in named:
        if key := storage_key(one.tensor):
            origins[key].append(Origin(one.tensor))
    return origins


def has_references(placeholders: Placeholders | None, origins: Origins) -> bool:
    """Return True if an unnamed tensor is left in the memory of named ones, or on a placeholder (if given).

    Counts the references of each storage, which is faster than walking everything that the model reaches.
    """
    first = ((key, it[0].before, 0) for key, it in origins.items() if placeholders is None or key not in placeholders)
    made = ((key, element, 1) for key, element in (placeholders.elements() if placeholders else ()))
    return any(
        torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
        > len(origins.get(key, ())) + registered + _FROM_COUNTING
        for key, tensor, registered in chain(first, made)
    )


def follow(model: nn.Module, placeholders: Placeholders, origins: Origins, *, last: bool) -> None:
    """Move the model's unnamed tensors to the memory of the named tensors that they were made of.

    Args:
        model: whose named tensors have been bound.
        placeholders: those that the model was built of.
        origins: named tensors before they were bound.
        last: no placeholder may be left.

    Raises:
        BindingError: a tensor is left on a placeholder, or could follow several tensors; it is named.
    """
    for step, tensor in tensors_from(model):
        key = storage_key(tensor)
        placeholder = placeholders.is_placeholder(tensor)
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
        elif placeholder and last:
            raise BindingError(f"{step.path} was left on a placeholder: binding found no tensor that it is part of")


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _span(tensor: torch.Tensor) -> int:
    """Return the number of elements from the first to the last, inclusive."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
