"""Digests of blobs in segments of the store, computed in a thread.

A check holds its own reference to the memory, so the store may release the segments meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared_store.base.digest import digest_at
from shared_store.base.manifest import Blob
from shared_store.memory import Access, Backend, Mapping, Segment, export

Part = tuple[Backend, Segment, Sequence[tuple[Blob, int]]]
"""A segment that the host can read, and blobs in it with their first bytes."""


class Check:
    """Blobs to be digested. :meth:`wrong` must be called once."""

    def __init__(self, parts: Iterable[Part]) -> None:
        """Take references to the segments."""
        self._parts: list[tuple[Mapping, Sequence[tuple[Blob, int]]]] = []
        try:
            for backend, segment, blobs in parts:
                self._parts.append((mapping_of(backend, segment), blobs))
        except BaseException:
            self._close()
            raise

    def wrong(self) -> list[tuple[Blob, bytes]]:
        """Return the blobs whose bytes do not match, with the digests found; drop the references."""
        try:
            return [different for mapping, blobs in self._parts for different in _differing(mapping, blobs)]
        finally:
            self._close()

    def _close(self) -> None:
        for mapping, _ in self._parts:
            mapping.close()
        self._parts.clear()


def mapping_of(backend: Backend, memory: Segment) -> Mapping:
    """Return a mapping with its own reference to a segment. The caller closes it."""
    with export(backend, memory) as fd:
        return Mapping(backend, backend.import_fd(fd.fileno(), memory.nbytes))


def _differing(mapping: Mapping, blobs: Iterable[tuple[Blob, int]]) -> list[tuple[Blob, bytes]]:
    mapping.map(Access.READ)
    found = [(blob, digest_at(mapping.address + offset, blob.nbytes)) for blob, offset in blobs]
    return [(blob, digest) for blob, digest in found if digest != blob.digest]
