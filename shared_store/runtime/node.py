"""The identity of a node, stable over restarts: the host's name and 16 random hexadecimal digits in a file."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from shared_store.runtime.paths import writing


def node_id(file: Path) -> str | None:
    """Return the node's id in the status and the catalog; None before the first run of a store."""
    try:
        word = file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    return f"{socket.gethostname()}-{word}" if word else None


def ensure_node_id(file: Path) -> str:
    """Return the node's id, and create it on the first run. Raises :class:`ConfigError` if it cannot be written."""
    known = node_id(file)
    if known is not None:
        return known
    fresh = file.with_suffix(".new")  # a full disk must not leave a partial id behind
    with writing(file.parent):
        fresh.write_text(os.urandom(8).hex() + "\n", encoding="ascii")
        fresh.rename(file)
    return f"{socket.gethostname()}-{file.read_text(encoding='ascii').strip()}"
