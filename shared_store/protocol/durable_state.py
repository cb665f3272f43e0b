"""What is held over the end of a store: segments by their fds, models, and digests of files.

The keeper has it, a new store is sent it, and the journal is a list of its changes. It is state and nothing else: what
is applied was decided by a store.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared_store.base.checkpoint import FileId
from shared_store.protocol import control
from shared_store.protocol.wire import close_fds
from shared_store.runtime.fds import OwnedFds

MAX_FILES = 100_000
_FILES_AT_ONCE = 1000


@dataclass
class HeldFd:
    """A segment's record, and the fd that keeps its memory; None: only the record is known."""

    record: control.SegmentRecord
    fd: int | None = None


@dataclass
class Holdings:
    """Segments by id, models by key, digests by uid and file. Owns the fds."""

    segments: dict[int, HeldFd] = field(default_factory=dict)
    models: dict[str, control.ModelRecord] = field(default_factory=dict)
    files: OrderedDict[tuple[int, FileId], bytes] = field(default_factory=OrderedDict)

    def apply(self, change: control.StateChange, fds: OwnedFds | None = None) -> None:
        """Apply a change, and take over its fds. Idempotent."""
        owned = [] if fds is None else fds.detach()
        fd = owned.pop(0).detach() if owned and isinstance(change, control.Hold) else None
        OwnedFds(owned).close()
        match change:
            case control.Hold(segment):
                self._hold(segment, fd)
            case control.Release(number):
                gone = self.segments.pop(number, None)
                if gone is not None and gone.fd is not None:
                    os.close(gone.fd)
            case control.NoteModel(model):
                self.models[model.key] = model
            case control.ForgetModel(key):
                self.models.pop(key, None)
            case control.NoteFiles(files):
                self.files.update({(uid, file): digest for uid, file, digest in files})
                while len(self.files) > MAX_FILES:
                    self.files.popitem(last=False)

    def _hold(self, segment: control.SegmentRecord, fd: int | None) -> None:
        before = self.segments.get(segment.id)
        if before is not None and before.fd is not None:
            if fd is None:
                return
            os.close(before.fd)
        self.segments[segment.id] = HeldFd(segment, fd)

    def changes(self) -> Iterator[tuple[control.StateChange, tuple[int, ...]]]:
        """What makes these holdings of none: changes in a fit order, and their fds, which stay this object's."""
        for held in self.segments.values():
            yield control.Hold(held.record), () if held.fd is None else (held.fd,)
        for model in self.models.values():
            yield control.NoteModel(model), ()
        files = [(uid, file, digest) for (uid, file), digest in self.files.items()]
        for start in range(0, len(files), _FILES_AT_ONCE):
            yield control.NoteFiles(tuple(files[start : start + _FILES_AT_ONCE])), ()

    def close(self) -> None:
        """Let go of all segments."""
        close_fds([held.fd for held in self.segments.values() if held.fd is not None])
        self.segments.clear()
        self.models.clear()
        self.files.clear()
