"""Engines whose workers a test moves, by commands of `moving.py`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.engines import EngineProcess

Move = Callable[..., dict[str, Any]]


def commands(process: EngineProcess) -> Move:
    """Return a function that runs a command of `moving.py` in an engine."""

    def run(what: str, **given: Any) -> dict[str, Any]:
        words = json.dumps(given, separators=(",", ":"))
        found = process.do(f"move {what} {words}")
        assert "error" not in found, found["error"]
        return found

    return run


@contextlib.contextmanager
def commanded(runtime_dir: Path, job: dict[str, Any], **environment: str) -> Iterator[Move]:
    """Run an engine for the block, which gets :func:`commands` of it. The engine must end well."""
    process = EngineProcess(runtime_dir, job, **environment)
    try:
        yield commands(process)
        process.tell("stop")
        assert process.finish() == 0, "\n".join(process.log[-40:])
    finally:
        process.close()
