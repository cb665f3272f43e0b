"""The side of a worker process in its conversation with a benchmark (``harness/processes.py``).

A worker sends events as JSON objects, one a line, on stdout, and receives words, one a line, on stdin. It exits when
its stdin is closed. Output of libraries goes to stderr. Times are seconds of the system's monotonic clock, and so
comparable between processes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

now = time.monotonic


class Talk:
    """The conversation with the benchmark."""

    def __init__(self) -> None:
        """Reserve stdout for events; redirect the output of libraries to stderr."""
        self._out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)

    def send(self, event: str, **facts: Any) -> None:
        """Send an event, with the current time as ``at``."""
        self._out.write(json.dumps({"event": event, "at": now(), **facts}) + "\n")

    def words(self) -> Iterator[str]:
        """Yield received words until the end of input."""
        while line := sys.stdin.readline():
            yield line.strip()


Role = Callable[[Talk, dict[str, Any]], None]


def play(roles: Mapping[str, Role]) -> None:
    """Run the role named by the command line with its JSON job, then exit without cleanup.

    An exception is sent as the event ``failed``, and its traceback goes to stderr. The exit code is then 1.
    """
    role, job = sys.argv[1:]
    talk = Talk()
    error: BaseException | None = None
    try:
        roles[role](talk, json.loads(job))
    except BaseException as caught:  # noqa: BLE001 - reported, and the process exits
        error = caught
        traceback.print_exception(error)
        talk.send("failed", error=f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    os._exit(1 if error else 0)  # skips the seconds that an engine's teardown takes; no benchmark measures it
