"""Committed blobs: where each digest is located, and which owners refer to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shared_store.store.state.owners import OwnerIndex


@dataclass
class BlobEntry:
    """A committed blob: size in bytes, location (segment id, first byte), and the owners of references to it."""

    nbytes: int
    segment: int
    offset: int
    references: set[str] = field(default_factory=set)


class Blobs:
    """All committed blobs by device and digest."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, bytes], BlobEntry] = {}
        self._owners = OwnerIndex[tuple[str, bytes]]()

    def get(self, device: str, digest: bytes) -> BlobEntry | None:
        """Return the blob with this digest, if it is committed on the device."""
        return self._entries.get((device, digest))

    def at(self, device: str, digest: bytes) -> BlobEntry:
        """Return the blob with this digest, which must be committed on the device."""
        return self._entries[device, digest]

    def present(self, device: str, digests: Iterable[bytes]) -> dict[bytes, BlobEntry]:
        """Return those of the digests that are committed on the device."""
        return {digest: entry for digest in digests if (entry := self._entries.get((device, digest)))}

    def all(self) -> dict[tuple[str, bytes], BlobEntry]:
        """Return every blob by device and digest."""
        return dict(self._entries)

    def add(self, device: str, digest: bytes, entry: BlobEntry) -> None:
        """Add a blob that was not committed before, without references."""
        self._entries[device, digest] = entry

    def refer(self, device: str, digest: bytes, owner: str) -> None:
        """Add a reference to a committed blob."""
        self._entries[device, digest].references.add(owner)
        self._owners.add(owner, (device, digest))

    def replace(self, device: str, digest: bytes, owner: str, by: str) -> None:
        """Add a reference by one owner, and remove that of another if there is one."""
        self._entries[device, digest].references.discard(owner)
        self._owners.discard(owner, (device, digest))
        self.refer(device, digest, by)

    def rename(self, owner: str, other: str) -> None:
        """Turn all references of an owner into those of another name."""
        for device, digest in self._owners.of(owner):
            self.replace(device, digest, owner, other)

    def drop(self, owner: str) -> list[tuple[bytes, BlobEntry]]:
        """Remove all references of an owner; remove and return the blobs that have none left, with their digests."""
        gone: list[tuple[bytes, BlobEntry]] = []
        for device, digest in self._owners.of(owner):
            entry = self._entries[device, digest]
            entry.references.discard(owner)
            self._owners.discard(owner, (device, digest))
            if not entry.references:
                gone.append((digest, self._entries.pop((device, digest))))
        return gone

    def condemn(self, device: str, digest: bytes) -> None:
        """Remove a blob that has references: none of its owners may count on it any more."""
        entry = self._entries.pop((device, digest))
        for owner in entry.references:
            self._owners.discard(owner, (device, digest))

    def references(self) -> dict[str, frozenset[tuple[str, bytes]]]:
        """Return the index of references by owner, for tests."""
        return self._owners.all()
