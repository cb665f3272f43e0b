"""The memory of LoRA adapters, moved into a range that can leave: every slot of every layer, used or not.

vLLM allocates the slots of all adapters at its start (``max_loras`` times ``max_lora_rank``) and writes adapters into
them later. The tensors stay the same objects, so that whatever refers to them follows. A storage to which something
refers that is not found stays where it is, and is not freed by a swap.

Relies on the layers being modules with the tensors in attributes, tuples and lists, beside a ``base_layer`` that is a
submodule; and on being called before CUDA graphs are captured, which have addresses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn

from shared_store.base.layout import ALIGNMENT, round_up
from shared_store.private.ranges import PrivateMemory
from shared_store.torch.views import StorageKey, bytes_in, storage_key, storage_of
from wooly_vllm import compat
from wooly_vllm.residency.rows import Rows

PAGE_BYTES: Final = 256 << 10
"""Bytes of a row. Rows of zeros are not copied: most slots are empty."""

_FROM_COUNTING: Final = 1
"""References to a storage that counting its references adds."""


def move_in(models: Iterable[nn.Module], memory: PrivateMemory) -> list[Rows]:
    """Move the adapters' memory of models into a new range. Returns its table; none without adapters.

    Raises:
        OutOfMemoryError: the device has no memory for a second copy, which exists for a moment.
    """
    found = {key: held for key, held in _by_storage(models).items() if not _held_elsewhere(held)}
    sizes = {key: round_up(held[0].untyped_storage().nbytes(), ALIGNMENT) for key, held in found.items()}
    if not found:
        return []
    target = bytes_in(storage_of(memory.allocate(round_up(sum(sizes.values()), PAGE_BYTES))))
    if not memory.backend.zeroed:
        target.zero_()
    start = 0
    for key, held in found.items():
        _move(held, target, start)
        start += sizes[key]
    return [Rows(target, 0, PAGE_BYTES, PAGE_BYTES, target.numel() // PAGE_BYTES)]


def _move(held: Sequence[torch.Tensor], target: torch.Tensor, start: int) -> None:
    """Copy a storage to a part of the target, and let its tensors have that."""
    source = bytes_in(held[0].untyped_storage())
    target[start : start + source.numel()].copy_(source)
    for tensor in held:
        offset = start // tensor.element_size() + tensor.storage_offset()
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.data = empty.set_(target.untyped_storage(), offset, tensor.shape, tensor.stride())


def _by_storage(models: Iterable[nn.Module]) -> dict[StorageKey, list[torch.Tensor]]:
    """Return the tensors of LoRA layers by their storage."""
    found: defaultdict[StorageKey, list[torch.Tensor]] = defaultdict(list)
    (layer,) = compat.find("vllm.lora.layers.base", "BaseLayerWithLoRA")
    seen: set[int] = set()
    for model in models:
        for module in model.modules():
            if isinstance(module, layer):
                for tensor in _tensors(vars(module), but=("_modules", "_parameters", "base_layer")):
                    key = storage_key(tensor)
                    if key is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        found[key].append(tensor)
    return found


def _tensors(value: Any, but: Sequence[str] = ()) -> Iterator[torch.Tensor]:
    """Iterate over the tensors of nested attributes and containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in but:
                yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _held_elsewhere(held: Sequence[torch.Tensor]) -> bool:
    """Return True if something refers to the storage of these tensors that is none of them."""
    count: int = torch._C._storage_Use_Count(held[0].untyped_storage()._cdata)
    return count > len(held) + _FROM_COUNTING
