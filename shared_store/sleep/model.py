"""A model that can sleep: its layout on the device, and the requests to the store that both directions make."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shared_store.base.errors import StoreUnavailableError, TimedOutError, WoolyError
from shared_store.base.manifest import Manifest
from shared_store.client.session import Session
from shared_store.memory import Backend
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.sleep.layout import ModelLayout

log = logging.getLogger(__name__)

NO_STORE: Final = (StoreUnavailableError, TimedOutError)
"""Errors of a request that no store answered."""


@dataclass(frozen=True)
class Model:
    """A model that this process reads.

    Attributes:
        session: the connection that reads it.
        manifest: its manifest.
        layout: its segments when they were mapped.
        backend: the backend of its device.
        timeout_s: seconds that another process may take to publish the model or its host copy.
    """

    session: Session
    manifest: Manifest
    layout: ModelLayout
    backend: Backend
    timeout_s: float

    def open(self, key: str, device: str, name: str) -> tuple[messages.Attached, OwnedFds] | None:
        """Open this model or its host copy. None: publication was granted."""
        return self.session.open(
            key, name=name, engine=self.manifest.engine, device=device, publish=True, timeout_s=self.timeout_s
        )

    @contextlib.contextmanager
    def publication(self, key: str) -> Iterator[None]:
        """Abort the publication of ``key`` if the block raises."""
        try:
            yield
        except BaseException:
            if self.session.alive:
                with contextlib.suppress(WoolyError):  # the first error is the one to report
                    self.session.abandon(key, "it could not be copied")
            raise

    def leave(self, key: str) -> None:
        """Stop being a reader of this model or its host copy. Does nothing if the store ended: it has no readers."""
        try:
            self.session.leave(key)
        except NO_STORE as error:
            log.debug("wooly: could not leave model %s: %s", key[:12], error)
