"""An activity page on the client's side: written at each step of an engine.

A step costs two stores to memory, and no system call: ``time.monotonic_ns`` reads the vDSO (``vdso(7)``), which a
benchmark checks. Until there is a page, and between two stores' pages, the writer writes to memory of its own.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from time import monotonic_ns

from shared_store.activity import layout
from shared_store.base.errors import ProtocolError, UnsupportedError
from shared_store.runtime.fds import OwnedFd

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
        if sys.byteorder != "little":
            fd.close()
            raise UnsupportedError("activity pages are little-endian")
        with fd:
            try:
                sealed = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
                size = os.fstat(fd.fileno()).st_size
                if not sealed or size < layout.SIZE:
                    raise ProtocolError("the store sent something else than an activity page")
                page = memoryview(mmap.mmap(fd.fileno(), layout.SIZE)).cast("Q")
            except OSError as error:
                raise ProtocolError(f"the store's activity page cannot be mapped: {error.strerror}") from error
        if page[layout.VERSION_WORD] != layout.VERSION:
            raise ProtocolError(f"the activity page has layout {page[layout.VERSION_WORD]}, not {layout.VERSION}")
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
