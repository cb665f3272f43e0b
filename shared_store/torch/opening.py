"""Identifying a model: its weight key, which needs the digest of the checkpoint, and opening it beside the load.

The digest of a checkpoint that nobody has hashed costs as much as reading it. The process that hashes it is the first
that needs the model, so it loads the model meanwhile, and :class:`Opening` hashes and opens in a thread. The files are
the same for both: they are compared with the identity that they had before (``Checkpoint.check_unchanged``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are another package

from shared_store.base.keys import weight_key
from shared_store.client.session import Session
from shared_store.disk.obtain import Opened
from shared_store.torch.steps import Identity


@contextlib.contextmanager
def key_of(
    identity: Identity, session: Session, timeout_s: float, on_hash: Callable[[int], None] = lambda _: None
) -> Iterator[str]:
    """Compute a weight key, hashing the checkpoint if the store does not remember its digest.

    A process that hashed the checkpoint is first in line for the model until the block ends.

    Args:
        identity: of the model.
        session: the connection.
        timeout_s: seconds that another process may take to hash.
        on_hash: called with bytes hashed since the last call, from any thread; what it raises ends the hashing.

    Raises:
        CheckpointError: a file cannot be read, or changes.
        TimedOutError: another process hashes the checkpoint for more than ``timeout_s`` seconds.
    """
    checkpoint = identity.checkpoint
    with progress("wooly: hashing the checkpoint", checkpoint.nbytes) as shown:

        def hashed(nbytes: int) -> None:
            on_hash(nbytes)
            shown(nbytes)

        with checkpoint.digest(session, timeout_s=timeout_s, progress=hashed) as digest:
            yield weight_key(digest, identity.facts)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar after one second; yield a function that takes bytes done. ``total`` 0: not known."""
    with tqdm(desc=title, total=total or None, unit="B", unit_scale=True, unit_divisor=1024, delay=1.0) as bar:
        yield bar.update


class Opening:
    """Hashes a checkpoint and opens its model, in a thread. A context manager: an error in the block ends the hashing.

    Opens the model as soon as the key is known, so that this process is first in line for it, and lets others hash
    other checkpoints, however long the block takes.
    """

    def __init__(
        self, identity: Identity, session: Session, open_model: Callable[[str], Opened | None], timeout_s: float
    ) -> None:
        """Prepare; the thread starts with the block.

        Args:
            identity: of the model.
            session: the connection.
            open_model: opens the model of a key, called in the thread.
            timeout_s: seconds that another process may take to hash.
        """
        self._identity = identity
        self._session = session
        self._open_model = open_model
        self._timeout_s = timeout_s
        self._decided = threading.Event()
        self._hashing = self._cancelled = False
        self._opened: Opened | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="wooly-open", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._cancelled = True

    def hashes(self) -> bool:
        """Wait until it is known whether this process hashes; False: another did, and the result follows at once."""
        self._decided.wait()
        return self._hashing

    def result(self) -> Opened | None:
        """Wait for the answer of ``open_model``. Raises what :func:`key_of` and ``open_model`` raise."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._opened

    def _run(self) -> None:
        try:
            with key_of(self._identity, self._session, self._timeout_s, self._hashed) as key:
                self._opened = self._open_model(key)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for the result
            self._error = error
        finally:
            self._decided.set()

    def _hashed(self, _: int) -> None:
        if self._cancelled:
            raise _CancelledError
        self._hashing = True
        self._decided.set()


class _CancelledError(Exception):
    """Ends the hashing of a load that failed."""
