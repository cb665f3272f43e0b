"""State that outlives a store: segments with their fds, models, and digests of files.

The keeper has it, sends it to each new store, and writes its changes to the journal. A store made every decision
before it sent a change; applying one decides nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared_store.base.checkpoint import FileId
from shared_store.protocol import keeper_messages
from shared_store.runtime.fds import OwnedFd, OwnedFds

MAX_FILES = 100_000
_FILES_AT_ONCE = 1000


@dataclass
class RetainedSegment:
    """A segment's record, and the fd that keeps its memory allocated. None: only the record is known."""

    record: keeper_messages.SegmentRecord
    fd: OwnedFd | None = None


@dataclass
class DurableState:
    """Segments by id, models by key, digests by uid and file. Owns the fds."""

    segments: dict[int, RetainedSegment] = field(default_factory=dict)
    models: dict[str, keeper_messages.ModelRecord] = field(default_factory=dict)
    files: OrderedDict[tuple[int, FileId], bytes] = field(default_factory=OrderedDict)

    def apply(self, change: keeper_messages.StateChange, fds: OwnedFds | None = None) -> None:
        """Apply a change, and take over its fds. Idempotent."""
        owned = [] if fds is None else fds.detach()
        fd = owned.pop(0) if owned and isinstance(change, keeper_messages.Hold) else None
        OwnedFds(owned).close()
        match change:
            case keeper_messages.Hold(segment):
                self._retain(segment, fd)
            case keeper_messages.Release(number):
                released = self.segments.pop(number, None)
                if released is not None and released.fd is not None:
                    released.fd.close()
            case keeper_messages.Vacate(number):
                left = self.segments.get(number)
                if left is not None and left.fd is not None:
                    left.fd.close()
                    left.fd = None
            case keeper_messages.NoteModel(model):
                self.models[model.key] = model
            case keeper_messages.ForgetModel(key):
                self.models.pop(key, None)
            case keeper_messages.NoteFiles(files):
                self.files.update({(uid, file): digest for uid, file, digest in files})
                while len(self.files) > MAX_FILES:
                    self.files.popitem(last=False)

    def _retain(self, segment: keeper_messages.SegmentRecord, fd: OwnedFd | None) -> None:
        before = self.segments.get(segment.id)
        if before is not None and before.fd is not None:
            if fd is None:
                before.record = segment
                return
            before.fd.close()
        self.segments[segment.id] = RetainedSegment(segment, fd)

    def changes(self) -> Iterator[tuple[keeper_messages.StateChange, tuple[int, ...]]]:
        """Yield changes that rebuild this state from an empty one, with the fds of each. The fds are borrowed."""
        for segment in self.segments.values():
            hold = keeper_messages.Hold(segment.record)
            yield hold, self.fds_of(hold)
        for model in self.models.values():
            yield keeper_messages.NoteModel(model), ()
        files = [(uid, file, digest) for (uid, file), digest in self.files.items()]
        for start in range(0, len(files), _FILES_AT_ONCE):
            yield keeper_messages.NoteFiles(tuple(files[start : start + _FILES_AT_ONCE])), ()

    def fds_of(self, change: keeper_messages.KeeperMessage) -> tuple[int, ...]:
        """Return the fds that go with a change, borrowed: that of the segment, while the state has it."""
        if not isinstance(change, keeper_messages.Hold):
            return ()
        segment = self.segments.get(change.segment.id)
        return () if segment is None or segment.fd is None else (segment.fd.fileno(),)

    def close(self) -> None:
        """Close the fds, and empty the state."""
        for segment in self.segments.values():
            if segment.fd is not None:
                segment.fd.close()
        self.segments.clear()
        self.models.clear()
        self.files.clear()
