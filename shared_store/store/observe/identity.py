"""The identity of a store."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from shared_store.runtime.node import ensure_node_id


@dataclass(frozen=True)
class Identity:
    """Identity of a store: ``node`` is stable over restarts, ``epoch`` differs for each process.

    ``started_at``: Unix seconds; ``started_monotonic``: monotonic seconds.
    """

    node: str
    epoch: str
    hostname: str
    runtime_dir: Path
    started_at: float
    started_monotonic: float


def identify(runtime_dir: Path, node_file: Path) -> Identity:
    """Return the identity of a store that starts now; the node's name is stored in a file."""
    node = ensure_node_id(node_file)
    return Identity(node, os.urandom(8).hex(), socket.gethostname(), runtime_dir, time.time(), time.monotonic())
