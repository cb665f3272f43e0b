"""Where a process's memory lies: in which of the store's mappings, and how much of that went private.

Knows every mapping that this process has, whatever model it was made for, so that it can tell of any tensor: of a part
of a model, a wrapped model, or one that outlived its model.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from pathlib import Path

import torch

from shared_store.memory import Mapping
from shared_store.torch.views import storage_key

_mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()
_lock = threading.Lock()

_PAGE_ENTRY = 8
_SHARED = 61  # bit: a page of a file or of shared memory
_THERE = 62  # two bits: swapped out, in memory


def register(mapping: Mapping) -> Mapping:
    """Take a new mapping into the register, for as long as it lives."""
    with _lock:
        _mappings.add(mapping)
    return mapping


def mapping_of(tensor: torch.Tensor) -> Mapping | None:
    """The mapping that a tensor's storage lies in; None where the memory is the process's own."""
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
    """Bytes of a mapped range that went private because this process wrote to their pages.

    On a GPU there are none: mappings are read-only. Relies on ``/proc/self/pagemap`` (see ``proc_pid_pagemap(5)``; its
    flags need no rights), one entry a page.
    """
    if mapping.ordinal is not None or nbytes == 0:
        return 0
    page = mmap.PAGESIZE
    first, last = address // page, (address + nbytes - 1) // page
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(first * _PAGE_ENTRY)
        entries = torch.frombuffer(bytearray(pagemap.read((last - first + 1) * _PAGE_ENTRY)), dtype=torch.int64)
    own = ((entries >> _THERE) & 0b11).bool() & ~((entries >> _SHARED) & 1).bool()
    outside = (address - first * page) * int(own[0]) + ((last + 1) * page - address - nbytes) * int(own[-1])
    return int(own.sum()) * page - outside
