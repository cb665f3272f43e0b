"""Copying blobs from segments to another one, through mappings of both.

One function for whoever copies: the store itself in host memory, a client on a GPU. Nothing is promised about what
the target has when a call fails.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shared_store.memory.backend import Access
from shared_store.memory.mapping import Mapping


@dataclass(frozen=True)
class Copy:
    """Bytes that are to be copied: index of their mapping, first byte there, first byte in the target."""

    source: int
    start: int
    offset: int
    nbytes: int


def copy_host(target: int, source: int, nbytes: int) -> None:
    """Copy host memory, by addresses."""
    ctypes.memmove(target, source, nbytes)


def copy_blobs(
    sources: Sequence[Mapping],
    target: Mapping,
    copies: Iterable[Copy],
    copy: Callable[[int, int, int], None] = copy_host,
) -> None:
    """Map the sources for reading and the target for writing, and copy. They stay mapped; ``copy``: see its default."""
    target.map(Access.WRITE)
    for mapping in sources:
        mapping.map(Access.READ)
    for one in copies:
        copy(target.address + one.offset, sources[one.source].address + one.start, one.nbytes)


def close_all(mappings: Iterable[Mapping]) -> None:
    """Close mappings, and with them this process's hold on their segments."""
    for mapping in mappings:
        mapping.close()
