"""The tensors of a loaded model, as a manifest describes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from shared_store.base.errors import UnsupportedError
from shared_store.base.manifest import ITEM_SIZES, TensorEntry
from shared_store.torch.reach import EXACT_LEAVES
from shared_store.torch.views import StorageKey, is_plain, storage_key

_ALIGN = (
    16  # size of the largest element: blobs begin at a multiple of it, so that offsets are whole elements of any dtype
)

MAX_HOST_BYTES = 1 << 20
"""Largest tensor in host memory that is published with a model on a GPU: engines keep copies of scales there."""

Kind = Literal["parameter", "buffer", "attribute"]


@dataclass(frozen=True)
class NamedTensor:
    """A tensor that a module names."""

    module: str
    name: str
    kind: Kind
    tensor: torch.Tensor
    persistent: bool

    @property
    def path(self) -> str:
        """The full dotted name."""
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass
class StorageRange:
    """The part of a storage that tensors of the model use.

    Attributes:
        sample: one of the tensors.
        start: first byte.
        end: byte after the last.
    """

    sample: torch.Tensor
    start: int
    end: int

    def bytes(self) -> torch.Tensor:
        """Return the range: uint8, shape ``(end - start,)``, not copied."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.sample.device)
        storage = self.sample.untyped_storage()
        return empty.set_(storage, self.start, (self.end - self.start,), (1,))


@dataclass(frozen=True)
class Collection:
    """The entries of a model's manifest, and the range with the bytes of each blob."""

    entries: tuple[TensorEntry, ...]
    ranges: tuple[StorageRange, ...]


def named_tensors(model: nn.Module) -> Iterator[NamedTensor]:
    """Iterate over every parameter, buffer and tensor attribute of every module, under every name.

    Attributes without elements are left out: engines use them as markers (an unset KV cache).
    """
    return tensors_of(dict(model.named_modules(remove_duplicate=False)))


def tensors_of(modules: Mapping[str, nn.Module]) -> Iterator[NamedTensor]:
    """Iterate as :func:`named_tensors` does, over modules by their paths."""
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield NamedTensor(path, name, "parameter", parameter, persistent=True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                yield NamedTensor(path, name, "buffer", buffer, persistent)
        for name, value in vars(module).items():
            # Most attributes are excluded by their type, which is ten times faster than isinstance of torch.
            if type(value) not in EXACT_LEAVES and isinstance(value, torch.Tensor) and value.numel():
                yield NamedTensor(path, name, "attribute", value, persistent=False)


def collect(
    model: nn.Module,
    device: torch.device,
    others: Iterable[torch.Tensor] = (),
    *,
    select: Callable[[NamedTensor], bool] = lambda _: True,
) -> Collection:
    """Describe a model's tensors.

    Args:
        model: loaded and post-processed.
        device: of all tensors, except small ones in host memory.
        others: tensors that the model reaches otherwise. They are not described, but ranges of storages that they
            share are extended to contain them.
        select: True for the named tensors to describe.

    Raises:
        UnsupportedError: a tensor cannot be shared; the message names it.
    """
    held = [named for named in named_tensors(model) if select(named)]
    for named in held:
        _check(named, device)
    ranges: dict[StorageKey | int, StorageRange] = {}
    for named in held:
        first, end = _extent(named.tensor)
        found = ranges.setdefault(_key(named.tensor), StorageRange(named.tensor, first, end))
        found.start, found.end = min(found.start, first), max(found.end, end)
    for tensor in others:
        if tensor.numel() and (known := ranges.get(_key(tensor))):
            if tensor.is_conj() or tensor.is_neg():
                raise UnsupportedError("the model has a lazily conjugated or negated view of one of its tensors")
            first, end = _extent(tensor)
            known.start, known.end = min(known.start, first), max(known.end, end)
    for found in ranges.values():
        found.start -= found.start % _ALIGN
    index = {key: number for number, key in enumerate(ranges)}
    aliases: dict[int, int] = {}
    entries = []
    for named in held:
        tensor, key = named.tensor, _key(named.tensor)
        size = tensor.element_size()
        offset = (tensor.storage_offset() * size - ranges[key].start) // size if tensor.numel() else 0
        entries.append(
            TensorEntry(
                module=named.module,
                name=named.name,
                kind=named.kind,
                blob=index[key],
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                stride=tuple(tensor.stride()),
                offset=offset,
                alias=aliases.setdefault(id(tensor), len(aliases)),
                persistent=named.persistent,
                requires_grad=tensor.requires_grad,
                host=tensor.device != device,
            )
        )
    return Collection(tuple(entries), tuple(ranges.values()))


def _key(tensor: torch.Tensor) -> StorageKey | int:
    """Return the key of a tensor's storage; without memory, one of its own."""
    return storage_key(tensor) or id(tensor)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor's elements in their storage, and the byte after the last."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    if not tensor.numel():
        return 0, 0
    last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (int(last) + 1) * size


def _check(named: NamedTensor, device: torch.device) -> None:
    tensor = named.tensor
    name = str(tensor.dtype).removeprefix("torch.")
    if not is_plain(tensor) or tensor.is_nested:
        raise UnsupportedError(f"{named.path} is a {type(tensor).__name__}, whose bytes are not plain memory")
    if tensor.layout is not torch.strided:
        raise UnsupportedError(f"{named.path} has layout {tensor.layout}")
    if name not in ITEM_SIZES:
        raise UnsupportedError(f"{named.path} has dtype {tensor.dtype}")
    if tensor.is_conj() or tensor.is_neg():
        raise UnsupportedError(f"{named.path} is a lazily conjugated or negated view")
    if tensor.device != device and (tensor.device.type != "cpu" or tensor.nbytes > MAX_HOST_BYTES):
        raise UnsupportedError(f"{named.path} is on {tensor.device}, the model on {device}")
