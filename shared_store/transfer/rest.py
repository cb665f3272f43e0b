"""The rest of segments that return to their device: blobs of models that their publisher does not publish.

Their host copies have them. Without the rest, blobs of the publisher would get other locations, and processes that
sleep with the segment would find it in pieces.
"""

from __future__ import annotations

import contextlib
import weakref

from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.transfer.copier import Piece
from shared_store.transfer.digest_check import ExpectedSpan
from shared_store.transfer.files import OpenFile


class Rest:
    """The rest of a plan. Closes its descriptors when closed or collected."""

    def __init__(self, planned: messages.Planned, fds: OwnedFds) -> None:
        """Take over the descriptors of the answer, also if this raises. Those of existing segments are closed."""
        segments = list(dict.fromkeys(blob.segment for blob in planned.rest))
        with contextlib.ExitStack() as owned:
            owned.enter_context(fds)
            files = [owned.enter_context(OpenFile("the host copy of a segment", fd)) for fd in fds.detach()]
            existing = len(files) - len(segments)
            self._files = dict(zip(segments, files[existing:], strict=True))
            self._blobs = planned.rest
            self._close = weakref.finalize(self, owned.pop_all().close)
        for file in files[:existing]:
            file.close()

    def pieces(self, segment: int, address: int) -> list[tuple[ExpectedSpan, Piece]]:
        """Return the copies to a segment (by its index in the plan) that is mapped at ``address``, with digests."""
        return [
            (
                (blob.digest, (address + blob.offset, blob.nbytes)),
                Piece(self._files[segment], blob.offset, address + blob.offset, blob.nbytes),
            )
            for blob in self._blobs
            if blob.segment == segment
        ]

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        self._close()
