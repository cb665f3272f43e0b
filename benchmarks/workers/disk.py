"""Restoring and opening a saved model in a fresh process, for the benchmark ``disk``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.harness.worker import Talk, play
from shared_store.client.session import Session
from shared_store.disk.obtain import Need, obtain
from shared_store.disk.restore import restore_resident
from shared_store.disk.saved import SavedModel
from shared_store.memory import backend_for

KEY = f"{1:064x}"
"""Weight key of the benchmark's model."""


def restore_seconds(saved: Path, device: str) -> float:
    """Restore the model into the store, and return the duration. The model stays there."""
    with Session.connect(autostart=False) as session:
        began = time.perf_counter()
        with SavedModel(saved) as opened:
            found = restore_resident(session, opened, device)
        if found.result != "restored":
            raise RuntimeError("the model was already in the store; nothing was measured")
        return time.perf_counter() - began


def open_seconds(device: str) -> float:
    """Open the model as an engine does, verified as ``WOOLY_VERIFY`` asks for, and return the duration."""
    backend = backend_for(device)
    with Session.connect(autostart=False) as session:
        began = time.perf_counter()
        opened = obtain(session, Need(KEY, "bench", "bench", publish=False, timeout_s=60), backend)
        took = time.perf_counter() - began
        if opened is not None:
            opened[1].close()
        return took


def restore(talk: Talk, job: dict[str, Any]) -> None:
    """Restore once. ``job``: ``saved`` (directory), ``device``."""
    talk.send("done", seconds=restore_seconds(Path(job["saved"]), job["device"]))


def attach(talk: Talk, job: dict[str, Any]) -> None:
    """Open once. ``job``: ``device``."""
    talk.send("done", seconds=open_seconds(job["device"]))


def main() -> None:
    """Run the role given on the command line."""
    play({"restore": restore, "attach": attach})
