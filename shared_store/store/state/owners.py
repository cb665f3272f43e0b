"""An index from owners of references to the things that they refer to.

An owner is the key of a committed model, the token of a publisher, a compaction or a withdrawn model, or a client that
uses models. With the index, dropping an owner takes time for the references that it has, not for all that the store
has.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)
T = TypeVar("T", bound=Hashable)


class OwnerIndex(Generic[Owner, T]):
    """Items by owner. An owner without items has no entry."""

    def __init__(self) -> None:
        # Dictionaries, because the garbage collector visits every item of a set, in each full collection.
        self._items: dict[Owner, dict[T, None]] = {}

    def add(self, owner: Owner, item: T) -> None:
        """Record that the owner refers to the item."""
        self._items.setdefault(owner, {})[item] = None

    def discard(self, owner: Owner, item: T) -> None:
        """Remove a reference; without effect if there is none."""
        items = self._items.get(owner)
        if items is not None:
            items.pop(item, None)
            if not items:
                del self._items[owner]

    def of(self, owner: Owner) -> frozenset[T]:
        """Return the items that the owner refers to."""
        return frozenset(self._items.get(owner, ()))

    def all(self) -> dict[Owner, frozenset[T]]:
        """Return a copy of the whole index."""
        return {owner: frozenset(items) for owner, items in self._items.items()}
