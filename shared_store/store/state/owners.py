"""An index from owners of references to the things that they refer to.

An owner is the key of a committed model, or the token of a publisher, a compaction or a withdrawn model. With the
index, dropping an owner takes time for the references that it has, not for all blobs of the store.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class OwnerIndex(Generic[T]):
    """Items by owner. An owner without items has no entry."""

    def __init__(self) -> None:
        self._items: dict[str, set[T]] = {}

    def add(self, owner: str, item: T) -> None:
        """Record that the owner refers to the item."""
        self._items.setdefault(owner, set()).add(item)

    def discard(self, owner: str, item: T) -> None:
        """Remove a reference; without effect if there is none."""
        items = self._items.get(owner)
        if items is not None:
            items.discard(item)
            if not items:
                del self._items[owner]

    def of(self, owner: str) -> frozenset[T]:
        """Return the items that the owner refers to."""
        return frozenset(self._items.get(owner, ()))

    def all(self) -> dict[str, frozenset[T]]:
        """Return a copy of the whole index."""
        return {owner: frozenset(items) for owner, items in self._items.items()}
