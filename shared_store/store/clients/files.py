"""Handlers of ``RecallFiles`` and ``RememberFiles``: digests of checkpoint files."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.base.digest import SIZE
from shared_store.base.errors import ProtocolError
from shared_store.protocol import messages
from shared_store.protocol.keeper_messages import NoteFiles
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.session import Answer, Session
from shared_store.store.state.store_state import StoreState


@dataclass(frozen=True, eq=False)
class FileRequests:
    """Digests of files, shared by clients of one uid."""

    _state: StoreState
    _keeper: KeeperLink

    async def recall(self, session: Session, request: messages.RecallFiles) -> Answer:
        """Answer with one digest for each file; empty bytes where none is known."""
        digests = tuple(self._state.files.get(session.client.uid, file) for file in request.files)
        return Answer(messages.FileDigests(request.id, digests))

    async def remember(self, session: Session, request: messages.RememberFiles) -> Answer:
        """Store digests of files.

        Raises:
            ProtocolError: a digest has another size.
        """
        uid = session.client.uid
        if any(len(digest) != SIZE for _, digest in request.files):
            raise ProtocolError(f"a digest has {SIZE} bytes")
        self._state.files.add({(uid, file): digest for file, digest in request.files})
        self._keeper.note_files(NoteFiles(tuple((uid, file, digest) for file, digest in request.files)))
        return Answer(messages.Done(request.id))
