"""Digests of checkpoint files, by the uid of the client that reported them.

A client reads only digests that clients of its own uid reported. The oldest are removed beyond a fixed number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from shared_store.base.checkpoint import FileId
from shared_store.protocol.durable_state import MAX_FILES


class FileDigests:
    """Digests by uid and file."""

    def __init__(self) -> None:
        self._digests: OrderedDict[tuple[int, FileId], bytes] = OrderedDict()

    def get(self, uid: int, file: FileId) -> bytes:
        """Return the file's digest; empty if no client of the uid reported it."""
        return self._digests.get((uid, file), b"")

    def add(self, digests: Mapping[tuple[int, FileId], bytes]) -> None:
        """Add digests; remove the oldest beyond :data:`MAX_FILES`."""
        self._digests.update(digests)
        while len(self._digests) > MAX_FILES:
            self._digests.popitem(last=False)

    def all(self) -> OrderedDict[tuple[int, FileId], bytes]:
        """Return a copy of all digests, oldest first."""
        return self._digests.copy()
