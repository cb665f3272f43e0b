"""Falling back to an engine's stock loading: one warning and one count in the store, or an error if configured."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from shared_store.base.errors import WoolyError
from shared_store.client.session import Session

_warned: set[tuple[str, str]] = set()
"""Model and reason of each warning of this process."""


@dataclass(frozen=True)
class Fallback:
    """An engine's rule for models that cannot be shared.

    Attributes:
        allowed: False raises the error instead.
        advice: the sentence of the warning that says how to disallow it.
        log: the engine's logger.
    """

    allowed: bool
    advice: str
    log: logging.Logger

    def report(self, session: Session | None, name: str, error: WoolyError) -> None:
        """Warn, count the fallback in the store, and close the session.

        Warns once in a process for each model and reason; counts every time.

        Args:
            session: the connection, or None if no store could be reached. Closed in any case.
            name: the model's name.
            error: why it cannot be shared.

        Raises:
            WoolyError: ``error`` itself, if falling back is not allowed.
        """
        if not self.allowed:
            if session is not None:
                session.close()
            raise error
        self._warn(name, error)
        if session is None:
            return
        try:
            session.report_fallback(name, f"{error.code}: {error}")
        except WoolyError as failure:
            self.log.warning("wooly: the store could not count this fallback: %s [%s]", failure, failure.code)
        finally:
            session.close()

    def _warn(self, name: str, error: WoolyError) -> None:
        if (name, str(error)) in _warned:
            return
        _warned.add((name, str(error)))
        self.log.warning(
            "wooly: %s is loaded the stock way, and not shared: %s [%s]. %s", name, error, error.code, self.advice
        )
