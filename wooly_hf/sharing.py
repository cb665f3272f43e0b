"""Measure which bytes of a model are shared, and make them private."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from shared_store.memory import unmapping
from shared_store.torch.mapping_registry import mapping_of, written_bytes
from shared_store.torch.reach import tensors_from
from shared_store.torch.views import StorageKey, storage_key
from wooly_hf.absent import looking


@dataclass(frozen=True)
class Stats:
    """Bytes of a model's tensors.

    Attributes:
        shared_bytes: in memory that all processes with this model share.
        private_bytes: in private memory of this process.
        written_bytes: the part of the private bytes that was shared until this process wrote to it.
        deferred_bytes: in mappings of this process, of any model, that nothing refers to any more and that stay until
            the capture of a CUDA graph ends.
    """

    shared_bytes: int
    private_bytes: int
    written_bytes: int
    deferred_bytes: int = 0


def stats(model: nn.Module) -> Stats:
    """Measure a model, a part of one, or a wrapper of one, such as PEFT's. Tied tensors count once."""
    shared = private = written = 0
    with looking():
        found = _by_storage(model)
    for (_, address), tensors in found.items():
        nbytes = tensors[0].untyped_storage().nbytes()
        mapping = mapping_of(tensors[0])
        if mapping is None:
            private += nbytes
            continue
        own = written_bytes(mapping, address, nbytes)
        shared += nbytes - own
        private += own
        written += own
    return Stats(shared, private, written, unmapping.deferred().nbytes)


def unshare(module: nn.Module) -> int:
    """Move a model, or a part of one, to private memory, so that it can be written to.

    See :func:`wooly_hf.unshare`.

    Returns:
        The bytes that became private.
    """
    return sum(_copy(tensors) for tensors in _by_storage(module).values() if mapping_of(tensors[0]) is not None)


def leave_files(model: nn.Module) -> None:
    """Copy all private tensors: one that stock loading left in a mapped checkpoint file keeps the whole file mapped."""
    for tensors in _by_storage(model).values():
        if mapping_of(tensors[0]) is None:
            _copy(tensors)


def _copy(tensors: list[torch.Tensor]) -> int:
    """Move all tensors of one storage to a copy of it, and return its size in bytes."""
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
