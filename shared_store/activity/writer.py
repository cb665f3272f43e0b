"""An activity page on the client's side: written at each step of an engine.

A step costs two stores to memory, and no system call: ``time.monotonic_ns`` reads the vDSO (``vdso(7)``), which a
benchmark checks. Until there is a page, and between two stores' pages, the writer writes to memory of its own.
"""

from __future__ import annotations

from time import monotonic_ns

from shared_store.activity import layout
from shared_store.runtime.fds import OwnedFd
from shared_store.runtime.pages import map_words

_STATE, _LAST_USE, _state_word = layout.STATE_WORD, layout.LAST_USE_WORD, layout.state_word  # looked up at each step


class ActivityWriter:
    """Writes one client's activity. Methods may be called from any thread; steps come from one."""

    def __init__(self) -> None:
        """Begin without a page."""
        self._words = memoryview(bytearray(layout.SIZE)).cast("Q")
        self.busy = False
        """True from the beginning of a step until a step ends with nothing left to run."""

    def attach(self, fd: OwnedFd) -> None:
        """Write to a page from here on, beginning with the present content. Closes the descriptor.

        Raises:
            ProtocolError: the descriptor is not an activity page that stays mapped.
            UnsupportedError: this machine is big-endian.
        """
        page = map_words(fd, "activity page", size=layout.SIZE, version=layout.VERSION)
        page[layout.STATE_WORD] = self._words[layout.STATE_WORD]
        page[layout.LAST_USE_WORD] = self._words[layout.LAST_USE_WORD]
        self._words = page

    def begin(self) -> None:
        """Say that a step begins. Costs next to nothing while the engine is busy already."""
        if not self.busy:
            self.busy = True
            self._words[layout.STATE_WORD] = layout.BUSY

    def end(self, running: int, waiting: int) -> None:
        """Say that a step ended.

        Args:
            running: requests that run now.
            waiting: requests that wait now.
        """
        words = self._words
        words[_STATE] = state = _state_word(running, waiting)
        words[_LAST_USE] = monotonic_ns()
        self.busy = state != 0
