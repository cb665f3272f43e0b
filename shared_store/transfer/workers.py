"""Threads that copy pieces between files and memory as they are handed in."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Literal, Self

from shared_store.transfer.copier import Copier, Piece, Progress, threads, unheard


class Workers:
    """Copies pieces in several threads until the block ends; then all that was handed in is done.

    What goes wrong in a thread stops the others, and is raised where pieces are handed in or the block ends. A block
    that ends with an error of its own waits for the pieces under way, and for no others.
    """

    def __init__(self, copier: Copier, way: Literal["load", "save"], progress: Progress = unheard) -> None:
        """``way``: from files to memory, or from memory to files."""
        self._copier = copier
        self._way = way
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
        """Hand in a piece of any size. Raises what went wrong so far."""
        self._raise()
        for part in piece.parts():
            self._pieces.put(part)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
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
                    if self._way == "load":
                        lane.load(piece)
                    else:
                        lane.save(piece)
                    self._progress(piece.nbytes)
        except BaseException as error:  # noqa: BLE001 - it is raised where the work was handed in
            self._error = self._error or error
            self._stop.set()
