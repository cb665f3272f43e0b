"""All mappings of this process, to tell for any tensor whether it is shared, and which of its pages became private.

Independent of models: it also answers for a part of a model, for a wrapped model, and for a tensor that outlives its
model.
"""

from __future__ import annotations

import threading
import weakref

import torch

from shared_store.memory import Mapping, pagemap
from shared_store.torch import captures
from shared_store.torch.views import storage_key

_mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()
_lock = threading.Lock()


def register(mapping: Mapping) -> Mapping:
    """Register a mapping for as long as it lives, and return it. That of a GPU is not unmapped during a capture."""
    if mapping.ordinal is not None:
        captures.watch()
    with _lock:
        _mappings.add(mapping)
    return mapping


def mapping_of(tensor: torch.Tensor) -> Mapping | None:
    """Return the mapping that contains a tensor's storage; None for private memory."""
    key = storage_key(tensor)
    if key is None:
        return None
    device, address = key
    ordinal = device.index if device.type == "cuda" else None
    with _lock:
        return next((one for one in _mappings if one.ordinal == ordinal and _covers(one, address)), None)


def _covers(mapping: Mapping, address: int) -> bool:
    return mapping.address <= address < mapping.address + mapping.nbytes


def written_bytes(mapping: Mapping, address: int, nbytes: int) -> int:
    """Return the bytes of a range that became private because this process wrote to their pages.

    Always 0 on a GPU, whose mappings are read-only.

    Args:
        mapping: contains the range.
        address: of the first byte.
        nbytes: of the range; pages count as far as they are in it.
    """
    if mapping.ordinal is not None:
        return 0
    return pagemap.written_bytes(address, nbytes)
