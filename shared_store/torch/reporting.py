"""Reports of a model's private bytes to the store, for its status.

What binding copied is known when a model is loaded, and is reported then. Pages that the engine wrote to are counted
beside it, in a thread: counting takes milliseconds for each GiB, and no load waits for it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass

from shared_store.base.errors import WoolyError
from shared_store.client.session import Session
from shared_store.memory import Mapping
from shared_store.torch.mapped_model import MappedModel


@dataclass(frozen=True)
class Reporting:
    """The reports about one model of this process.

    Attributes:
        session: the connection, a reader of the model.
        key: the weight key.
        name: the model's name.
        copied: bytes in private memory since the model was bound.
        log: the engine's logger.
    """

    session: Session
    key: str
    name: str
    copied: int
    log: logging.Logger

    def report(self, written: int = 0) -> None:
        """Report the private bytes, of which ``written`` are in pages that this process wrote to.

        Logs errors: a status without this number is no reason to load the model again.
        """
        try:
            self.session.report(self.key, self.copied + written)
        except WoolyError as error:
            self.log.warning(
                "wooly: could not report the private bytes of %s to the store: %s [%s]", self.name, error, error.code
            )

    def count_written(self, mapped: MappedModel) -> None:
        """Count the bytes that this process wrote to until now, in a thread, and report them if there are any.

        The thread keeps no mapping alive that it is not counting. There is none for a GPU, whose mappings cannot be
        written to.
        """
        mappings = [weakref.ref(mapping) for _, mapping in mapped.mappings() if mapping.ordinal is None]
        if mappings:
            threading.Thread(target=self._count, args=(mappings,), name="wooly-count", daemon=True).start()

    def _count(self, mappings: list[weakref.ref[Mapping]]) -> None:
        written = 0
        for each in mappings:
            mapping = each()
            if mapping is not None:
                try:
                    written += mapping.private_bytes()
                except WoolyError as error:
                    self.log.warning("wooly: cannot count the private pages of %s: %s", self.name, error)
                    return
            del mapping
        if written and self.session.alive:
            self.report(written)
