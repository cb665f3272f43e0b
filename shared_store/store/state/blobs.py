"""Committed blobs: where each digest is located, and which owners refer to it.

A store has very many blobs, so an entry is a struct that the garbage collector does not visit (it refers to strings
only), and most entries have a single owner. How many blobs of a segment an owner refers to is counted beside them:
whether a segment can be released is asked for all segments, and must not visit every blob.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shared_store.store.state.owners import OwnerIndex


class BlobEntry(msgspec.Struct, gc=False):
    """A committed blob: size in bytes, location (segment id, first byte), and the owners of references to it."""

    nbytes: int
    segment: int
    offset: int
    owners: str | set[str] | None = None
    """The only owner, or several. :attr:`references` has the same as a set."""

    @property
    def references(self) -> set[str]:
        """A copy of the owners."""
        if isinstance(self.owners, set):
            return set(self.owners)
        return set() if self.owners is None else {self.owners}

    def refer(self, owner: str) -> bool:
        """Add an owner; return whether it is new."""
        if self.owners is None:
            self.owners = owner
        elif isinstance(self.owners, set):
            if owner in self.owners:
                return False
            self.owners.add(owner)
        elif self.owners == owner:
            return False
        else:
            self.owners = {self.owners, owner}
        return True

    def discard(self, owner: str) -> bool:
        """Remove an owner; return whether it was one."""
        if isinstance(self.owners, set):
            if owner not in self.owners:
                return False
            self.owners.remove(owner)
            if len(self.owners) == 1:
                self.owners = self.owners.pop()
            return True
        if self.owners != owner:
            return False
        self.owners = None
        return True


class Blobs:
    """All committed blobs by device and digest."""

    def __init__(self) -> None:
        # By device, then digest: the garbage collector does not visit a dictionary from bytes to such structs.
        self._entries: dict[str, dict[bytes, BlobEntry]] = {}
        self._owners = OwnerIndex[str, tuple[str, bytes]]()
        self._counts: dict[int, dict[str, int]] = {}  # by segment and owner: number of references; never zero

    def get(self, device: str, digest: bytes) -> BlobEntry | None:
        """Return the blob with this digest, if it is committed on the device."""
        return self._on(device).get(digest)

    def at(self, device: str, digest: bytes) -> BlobEntry:
        """Return the blob with this digest, which must be committed on the device."""
        return self._entries[device][digest]

    def present(self, device: str, digests: Iterable[bytes]) -> dict[bytes, BlobEntry]:
        """Return those of the digests that are committed on the device."""
        known = self._on(device)
        return {digest: entry for digest in digests if (entry := known.get(digest))}

    def all(self) -> dict[tuple[str, bytes], BlobEntry]:
        """Return every blob by device and digest."""
        return {(device, digest): entry for device, known in self._entries.items() for digest, entry in known.items()}

    def owners_in(self, segment: int) -> set[str]:
        """Return the owners of references to blobs in a segment."""
        return set(self._counts.get(segment, ()))

    def add(self, device: str, digest: bytes, entry: BlobEntry) -> None:
        """Add a blob that was not committed before, without references."""
        self._entries.setdefault(device, {})[digest] = entry

    def refer(self, device: str, digest: bytes, owner: str) -> None:
        """Add a reference to a committed blob."""
        entry = self._entries[device][digest]
        if entry.refer(owner):
            self._count(entry.segment, owner, 1)
            self._owners.add(owner, (device, digest))

    def replace(self, device: str, digest: bytes, owner: str, by: str) -> None:
        """Add a reference by one owner, and remove that of another if there is one."""
        self._discard(self._entries[device][digest], device, digest, owner)
        self.refer(device, digest, by)

    def rename(self, owner: str, other: str) -> None:
        """Turn all references of an owner into those of another name."""
        for device, digest in self._owners.of(owner):
            self.replace(device, digest, owner, other)

    def drop(self, owner: str) -> list[tuple[bytes, BlobEntry]]:
        """Remove all references of an owner; remove and return the blobs that have none left, with their digests."""
        gone: list[tuple[bytes, BlobEntry]] = []
        for device, digest in self._owners.of(owner):
            entry = self._entries[device][digest]
            self._discard(entry, device, digest, owner)
            if entry.owners is None:
                gone.append((digest, self._entries[device].pop(digest)))
        return gone

    def relocate(self, entry: BlobEntry, segment: int, offset: int) -> None:
        """Give a blob another location."""
        for owner in entry.references:
            self._count(entry.segment, owner, -1)
            self._count(segment, owner, 1)
        entry.segment, entry.offset = segment, offset

    def condemn(self, device: str, digest: bytes) -> None:
        """Remove a blob that has references: none of its owners may count on it any more."""
        entry = self._entries[device].pop(digest)
        for owner in entry.references:
            self._discard(entry, device, digest, owner)

    def references(self) -> dict[str, frozenset[tuple[str, bytes]]]:
        """Return the index of references by owner, for tests."""
        return self._owners.all()

    def counts(self) -> dict[int, dict[str, int]]:
        """Return the number of references by segment and owner, for tests."""
        return {segment: dict(counts) for segment, counts in self._counts.items()}

    def _on(self, device: str) -> dict[bytes, BlobEntry]:
        return self._entries.get(device, {})

    def _discard(self, entry: BlobEntry, device: str, digest: bytes, owner: str) -> None:
        if entry.discard(owner):
            self._count(entry.segment, owner, -1)
            self._owners.discard(owner, (device, digest))

    def _count(self, segment: int, owner: str, by: int) -> None:
        counts = self._counts.setdefault(segment, {})
        left = counts.get(owner, 0) + by
        if left:
            counts[owner] = left
        else:
            del counts[owner]
            if not counts:
                del self._counts[segment]
