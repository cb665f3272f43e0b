"""Worker threads that copy pieces between files and memory."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Literal, Self

from shared_store.transfer.copier import Copier, Piece, Progress, ignore_progress, threads


class Workers:
    """A context manager that copies pieces in several threads; all copies are complete when the block ends.

    An error in a thread stops the other threads and is raised by the next :meth:`put` or at the end of the block. If
    the block raises, copies in progress are finished and queued ones are dropped.
    """

    def __init__(
        self, copier: Copier, direction: Literal["load", "save"], progress: Progress = ignore_progress
    ) -> None:
        """Prepare the threads; they start with the block.

        Args:
            copier: the copier of the memory's device.
            direction: ``load`` copies from files to memory, ``save`` from memory to files.
            progress: called with bytes copied, from any thread.
        """
        self._copier = copier
        self._direction = direction
        self._progress = progress
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, name=f"wooly-copy-{n}") for n in range(threads())]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def put(self, piece: Piece) -> None:
        """Queue a piece of any size. Raises the first error of a thread."""
        self._raise()
        for part in piece.parts():
            self._pieces.put(part)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._stop.set()
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            with self._copier.lane() as lane:
                while (piece := self._pieces.get()) is not None and not self._stop.is_set():
                    if self._direction == "load":
                        lane.load(piece)
                    else:
                        lane.save(piece)
                    self._progress(piece.nbytes)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that queues the pieces
            self._error = self._error or error
            self._stop.set()
