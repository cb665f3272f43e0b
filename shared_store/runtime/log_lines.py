"""Log records as one line each, whatever text of other processes they contain."""

from __future__ import annotations

import logging

from shared_store.base.text import one_line

LONGEST_MESSAGE = 4000
"""Characters of a message; the rest is cut. A traceback follows on lines of its own, uncut."""

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class OneLineFormatter(logging.Formatter):
    """Escapes control characters in messages: a client must not add lines to a log, or act on a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging calls
        """Format the record's message, escaped and cut."""
        record.message = one_line(record.message, LONGEST_MESSAGE)
        return super().formatMessage(record)


def configure(level: str) -> None:
    """Log to stderr from this level on, one line a record."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineFormatter(FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
