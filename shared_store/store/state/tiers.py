"""Tiers: which segments have host copies, which clients need those, and which segments leave their device.

A client that is to sleep first has the host copies of its model's segments made, then needs them until it is awake
again: its reference keeps the segments in the store, in any tier. A segment leaves its device when a model in it has
readers that are away, none of its models has readers that are awake, and its host copy exists. A segment without one
leaves if all of its blobs have a former location in a lower tier: they return to it.

The host copy of a segment of host memory is a file; files are the lowest tier, and never leave.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from shared_store.base.errors import ProtocolError
from shared_store.base.layout import Layout
from shared_store.base.manifest import Blob
from shared_store.store.state.owners import OwnerIndex
from shared_store.store.state.publish_plan import Elsewhere
from shared_store.store.state.residency import BELOW, FILES, HOST, Event, Residency
from shared_store.store.state.segment_entry import SegmentEntry
from shared_store.store.state.segments import Segments


class Use(enum.Enum):
    """How an owner of references needs a segment on its device."""

    AWAKE = "awake"  # it may be mapped, or is being copied or published, or is pinned
    AWAY = "away"  # a model whose readers are all away
    IDLE = "idle"  # a model without readers


@dataclass(frozen=True)
class HostCopying:
    """Host copies that a client makes, or the store for it: ids of the new segments, by the segment that they copy."""

    token: str
    key: str
    client: int
    copies: dict[int, int]


@dataclass(frozen=True)
class Moving:
    """A host copy that is moved to a file: ids of the segment, its host copy, and the file."""

    token: str
    segment: int
    host: int
    file: int


class Tiers:
    """The tiers of a store's segments."""

    def __init__(self, segments: Segments, use: Callable[[str], Use]) -> None:
        """``use`` tells how an owner of references needs its segments."""
        self._segments = segments
        self._use = use
        self._copying: dict[tuple[int, str], HostCopying] = {}
        self._being_copied: set[int] = set()
        self._users = OwnerIndex[str, int]()  # clients that need host copies, by model
        self._keys: dict[int, set[str]] = {}  # the models whose host copies a client needs
        self._candidates: set[int] = set()
        self._former: dict[tuple[str, bytes], tuple[int, int]] = {}

    # Host copies.

    def being_copied(self, segments: Iterable[int]) -> bool:
        """Whether a client makes the host copy of one of these segments."""
        return not self._being_copied.isdisjoint(segments)

    def without_host_copy(self, segments: Iterable[int]) -> list[int]:
        """Return those of the segments that have no host copy."""
        return [one for one in segments if self._segments.at(one).host is None]

    def host_of(self, segment: int) -> int:
        """Return the id of the host copy of a segment that has one."""
        host = self._segments.at(segment).host
        assert host is not None  # noqa: S101 - the callers asked `without_host_copy`
        return host

    def copy_bytes(self, device: str) -> int:
        """Return the bytes of host copies on a device, with those that are being made."""
        promised = [host for one in self._copying.values() for host in one.copies.values()]
        entries = [self._segments.at(host) for host in promised]
        making = sum(entry.nbytes for entry in entries if entry.device == device)
        return making + self._segments.copied_bytes(device)

    def begin_copying(self, key: str, client: int, segments: Sequence[int], device: str = HOST) -> HostCopying:
        """Promise host copies of segments that have none. ``device``: host memory, or files."""
        token = f"{key}/copies of {client}"
        copies = {
            segment: self._segments.promise(device, self._segments.at(segment).nbytes, token) for segment in segments
        }
        for host in copies.values():
            self._segments.at(host).placed = self._segments.at(host).nbytes
        self._copying[client, key] = HostCopying(token, key, client, copies)
        self._being_copied.update(segments)
        return self._copying[client, key]

    def copying(self, key: str, client: int) -> HostCopying:
        """Return the host copies that a client makes. Raises :class:`ProtocolError` if it makes none."""
        found = self._copying.get((client, key))
        if found is None:
            raise ProtocolError(f"client {client} makes no host copies of {key}")
        return found

    def running(self, copying: HostCopying) -> bool:
        """Whether the copies were neither added nor dropped."""
        return self._copying.get((copying.client, copying.key)) is copying

    def cancel_copying(self, key: str, client: int) -> list[int]:
        """Drop the copies that a client makes; return the segments to release. Idempotent."""
        copying = self._copying.pop((client, key), None)
        if copying is None:
            return []
        self._being_copied.difference_update(copying.copies)
        return self._segments.drop(copying.token)

    def end_copying(self, copying: HostCopying) -> list[int]:
        """Add verified copies. Returns segments to release: copies of segments that are gone or were quarantined."""
        for segment, host in copying.copies.items():
            if self._segments.has(segment):
                entry = self._segments.at(segment)
                if entry.host is None and not entry.quarantined:
                    self._segments.add_host_copy(segment, host)
        return self.cancel_copying(copying.key, copying.client)

    def movable(self) -> list[int]:
        """Return the segments that are in host memory alone, unless a client is making copies for them."""
        return [
            segment
            for segment in self._segments.elsewhere - self._segments.filed
            if self._segments.at(segment).residency is Residency.HOST
        ]

    def begin_moving(self, segment: int) -> Moving:
        """Promise a file for the host copy of a segment that is in host memory alone."""
        token = f"segment {segment} to a file"
        file = self._segments.promise(FILES, self._segments.at(segment).nbytes, token)
        self._segments.at(file).placed = self._segments.at(file).nbytes
        return Moving(token, segment, self.host_of(segment), file)

    def end_moving(self, moving: Moving) -> list[int] | None:
        """Make a file that is filled and verified the host copy of its segment.

        Returns the segments to release; None, without a change, if the segment is gone, or is not in host memory alone
        any more.
        """
        if not self._segments.has(moving.segment):
            return None
        entry = self._segments.at(moving.segment)
        if entry.host != moving.host or entry.residency is not Residency.HOST:
            return None
        self._segments.step(moving.segment, Event.SAVED)
        released = self._segments.drop_host_copy(moving.segment)
        self._segments.add_host_copy(moving.segment, moving.file)
        return released

    def cancel_moving(self, moving: Moving) -> list[int]:
        """Return the segments to release after a move that failed. Idempotent, and without effect after its end."""
        return self._segments.drop(moving.token)

    # Clients that need host copies.

    def needing(self, segment: int) -> list[tuple[int, str]]:
        """Return the clients that need the host copy of a segment, by number, and the model that each needs it for."""
        references = self._segments.at(segment).references
        return [
            (client, key)
            for client, keys in self._keys.items()
            for key in sorted(keys)
            if _owner(key, client) in references
        ]

    def need(self, key: str, client: int, segments: Iterable[int]) -> list[int]:
        """Record that a client needs the host copies of these segments of a model.

        Replaces what it needed before. Returns the segments to release.
        """
        present = [segment for segment in segments if self._segments.has(segment)]
        for segment in present:
            self._segments.refer(segment, f"{_owner(key, client)}/next")
        released = self._segments.drop(_owner(key, client))
        for segment in present:
            self._segments.refer(segment, _owner(key, client))
        self._segments.drop(f"{_owner(key, client)}/next")  # releases nothing: the reference above has all of them
        self._users.add(key, client)
        self._keys.setdefault(client, set()).add(key)
        return self._forget(released)

    def needs(self, key: str, client: int) -> bool:
        """Whether a client needs the host copies of a model."""
        return client in self._users.of(key)

    def needed_by(self, client: int) -> list[str]:
        """Return the keys of the models whose host copies a client needs."""
        return list(self._keys.get(client, ()))

    def let_go(self, key: str, client: int) -> list[int]:
        """Record that a client needs no host copies of a model; return the segments to release. Idempotent."""
        self._users.discard(key, client)
        keys = self._keys.get(client, set())
        keys.discard(key)
        if not keys:
            self._keys.pop(client, None)
        return self._forget(self._segments.drop(_owner(key, client)))

    def let_go_all(self, key: str) -> list[int]:
        """Record that no client needs the host copies of a model; return the segments to release."""
        return [segment for client in self._users.of(key) for segment in self.let_go(key, client)]

    def lost(self, client: int) -> list[int]:
        """Remove a client from everything; return the segments to release."""
        released: list[int] = []
        for number, key in list(self._copying):
            if number == client:
                released += self.cancel_copying(key, number)
        for key in list(self._keys.get(client, ())):
            released += self.let_go(key, client)
        return released

    def spare(self, needed: int, device: str = HOST) -> list[int]:
        """Return resident segments whose host copies no client needs, until those have ``needed`` bytes of a device."""
        found = []
        for entry in self._segments.on(device):
            if needed <= 0:
                break
            if entry.host_of is None:
                continue
            source = self._segments.at(entry.host_of)
            if source.residency is Residency.RESIDENT and not any(map(_is_need, source.references)):
                found.append(source.id)
                needed -= entry.nbytes
        return found

    # Leaving.

    def may_leave(self, segments: Iterable[int]) -> None:
        """Consider segments for leaving: a reader of a model in them is away."""
        self._candidates.update(segments)

    def leave(self) -> tuple[list[int], list[int], set[str]]:
        """Move every segment that may leave.

        Returns:
            Segments whose device memory must be released; segments to release altogether, because their blobs returned
            to former locations; and the owners of those blobs.
        """
        left: list[int] = []
        emptied: list[int] = []
        relocated: set[str] = set()
        for segment in sorted(self._candidates):
            entry = self._segments.at(segment) if self._segments.has(segment) else None
            if entry is None or entry.residency is not Residency.RESIDENT or entry.quarantined:
                self._candidates.discard(segment)
                continue
            if not entry.settled:
                continue
            uses = {self._use(owner) for owner in self._segments.owners(segment) if not _is_need(owner)}
            if Use.AWAKE in uses:
                continue
            if Use.AWAY not in uses:
                self._candidates.discard(segment)
            elif entry.host is not None:
                self._segments.step(segment, Event.LEAVE)
                self._candidates.discard(segment)
                left.append(segment)
            elif places := self._former_places(entry):
                relocated |= self._segments.owners(segment)
                for digest, place in places.items():
                    del self._former[entry.device, digest]
                    self._segments.move(digest, *place)
                emptied += self._segments.sweep([segment])
        return left, self._forget(emptied), relocated

    def moved(self, device: str, before: dict[bytes, tuple[int, int]]) -> None:
        """Remember former locations (segment id, first byte) of blobs that were published to other ones."""
        for digest, place in before.items():
            if self._segments.has(place[0]):
                self._former[device, digest] = place
                blob = self._segments.blobs.get(device, digest)
                if blob is not None:
                    self._candidates.add(blob.segment)

    def forget(self, released: Collection[int]) -> None:
        """Forget former locations in segments that are gone."""
        self._forget(list(released))

    # Returning.

    def elsewhere(self, device: str, blobs: Sequence[Blob], preferred: Layout | None, *, whole: bool) -> Elsewhere:
        """Return those of the blobs that are not on their device, and the segments that can return for them.

        A segment can return if the preferred layout (if there is one) is its own, and the plan has all of its blobs or
        the others are written too (``whole``).
        """
        if not self._segments.elsewhere:
            return Elsewhere()
        if preferred is not None and len(preferred.placements) != len(blobs):
            return Elsewhere()  # the draft refuses it
        indices: dict[bytes, list[int]] = {}
        for index, blob in enumerate(blobs):
            indices.setdefault(blob.digest, []).append(index)
        missing: dict[int, dict[bytes, int]] = {}
        for digest, blob_entry in self._segments.blobs.present(device, indices).items():
            if blob_entry.segment in self._segments.elsewhere:
                missing.setdefault(blob_entry.segment, {})[digest] = blob_entry.offset
        segments: dict[int, int] = {}
        places: dict[bytes, tuple[int, int]] = {}
        rest: dict[int, list[tuple[Blob, int]]] = {}
        for segment, offsets in missing.items():
            entry = self._segments.at(segment)
            if entry.residency not in BELOW or not (whole or entry.blobs <= offsets.keys()):
                continue
            if preferred is not None and not _fits(entry, offsets, indices, preferred):
                continue
            segments[segment] = entry.nbytes
            places.update({digest: (segment, offset) for digest, offset in offsets.items()})
            if others := [found for found in self._segments.contents(segment) if found[0].digest not in offsets]:
                rest[segment] = others
        digests = frozenset(digest for offsets in missing.values() for digest in offsets)
        return Elsewhere(digests, segments, places, rest)

    def _former_places(self, entry: SegmentEntry) -> dict[bytes, tuple[int, int]]:
        """Return a former location in a lower tier for each blob of a segment; empty if one has none."""
        found = {}
        for digest in entry.blobs:
            place = self._former.get((entry.device, digest))
            if place is None or place[0] not in self._segments.elsewhere:
                return {}
            if self._segments.at(place[0]).residency not in BELOW:
                return {}
            found[digest] = place
        return found

    def _forget(self, released: list[int]) -> list[int]:
        if released and self._former:
            gone = set(released)
            self._former = {blob: place for blob, place in self._former.items() if place[0] not in gone}
        return released


def _owner(key: str, client: int) -> str:
    """Return the owner of a client's references to the segments whose host copies it needs."""
    return f"{key}/needed by {client}"


def _is_need(owner: str) -> bool:
    return "/needed by " in owner


def _fits(entry: SegmentEntry, offsets: dict[bytes, int], indices: dict[bytes, list[int]], preferred: Layout) -> bool:
    """Whether a layout has the blobs of a segment at their offsets, in one segment of the same size."""
    spots = [(preferred.placements[index], offset) for digest, offset in offsets.items() for index in indices[digest]]
    used = {spot.segment for spot, _ in spots}
    if len(used) != 1 or any(spot.offset != offset for spot, offset in spots):
        return False
    (segment,) = used
    return 0 <= segment < len(preferred.sizes) and preferred.sizes[segment] == entry.nbytes
