"""Handler of ``GetActivityPage``: a page of shared memory in which a client says whether it works."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.activity.page import make_page
from shared_store.base.errors import ConnectionLostError
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.store.activity_pages import ActivityPages
from shared_store.store.session import Answer, Session


@dataclass(frozen=True, eq=False)
class ActivityRequests:
    """Activity pages of clients."""

    _pages: ActivityPages

    async def get_page(self, session: Session, request: messages.GetActivityPage) -> Answer:
        """Answer with the descriptor of a new page.

        Raises:
            MemoryBackendError: the kernel refuses the page.
            ConnectionLostError: the client disconnected.
        """
        if session.gone.is_set():
            raise ConnectionLostError("the client disconnected")
        page, fd = make_page()
        self._pages.put(session.client.number, page)
        return Answer(messages.PageGranted(request.id), OwnedFds([fd]))
