"""What of a model is shared now, and how to make it private."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from shared_store.torch.mapping_registry import mapping_of, written_bytes
from shared_store.torch.reach import tensors_from
from shared_store.torch.views import StorageKey, storage_key


@dataclass(frozen=True)
class Stats:
    """Bytes of a model's tensors, by where they lie now.

    Attributes:
        shared_bytes: in memory that all processes with this model share.
        private_bytes: this process's own.
        written_bytes: the part of the private bytes that was shared until this process wrote there.
    """

    shared_bytes: int
    private_bytes: int
    written_bytes: int


def stats(model: nn.Module) -> Stats:
    """Measure a model, or any part of one; what wraps a model (as PEFT does) counts too. Tied tensors count once."""
    shared = private = written = 0
    for (_, address), tensors in _by_storage(model).items():
        nbytes = tensors[0].untyped_storage().nbytes()
        mapping = mapping_of(tensors[0])
        if mapping is None:
            private += nbytes
            continue
        own = written_bytes(mapping, address, nbytes)
        shared += nbytes - own
        private += own
        written += own
    return Stats(shared, private, written)


def unshare(module: nn.Module) -> int:
    """Give a model, or a part of one, memory of its own, so that it may be written to.

    Tensor objects stay the same ones, so ties stay ties, and whoever refers to them follows. Views that are neither in
    the module nor reached from it keep the shared memory.

    Returns:
        Bytes that were shared and are private now.
    """
    return sum(_copy(tensors) for tensors in _by_storage(module).values() if mapping_of(tensors[0]) is not None)


def leave_files(model: nn.Module) -> None:
    """Copy what is not shared: a tensor that stock loading left in a mapped checkpoint file keeps all of it mapped."""
    for tensors in _by_storage(model).values():
        if mapping_of(tensors[0]) is None:
            _copy(tensors)


def _copy(tensors: list[torch.Tensor]) -> int:
    """Move all tensors of one storage to a copy of it; its size in bytes."""
    shared = tensors[0].untyped_storage()
    own = torch.UntypedStorage(shared.nbytes(), device=shared.device)  # type: ignore[no-untyped-call]  # torch's
    own.copy_(shared, non_blocking=False)
    for tensor in tensors:
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.data = empty.set_(own, tensor.storage_offset(), tensor.shape, tensor.stride())
    return own.nbytes()


def _by_storage(module: nn.Module) -> dict[StorageKey, list[torch.Tensor]]:
    found: dict[StorageKey, list[torch.Tensor]] = defaultdict(list)
    for _, tensor in tensors_from(module):
        if (key := storage_key(tensor)) is not None:
            found[key].append(tensor)
    return found
