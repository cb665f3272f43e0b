"""Runs an arbiter over an inherited socket to its store."""

from __future__ import annotations

import os
import socket
import sys

from shared_store.compute.arbiter.link import Link
from shared_store.compute.arbiter.loop import Arbiter
from shared_store.runtime import log_lines
from shared_store.runtime.fds import raise_file_limit


def main() -> None:
    """Run one, until the store's end closes."""
    number = int(sys.argv[1])
    os.set_inheritable(number, False)
    log_lines.configure("INFO")
    raise_file_limit()
    Arbiter(Link(socket.socket(fileno=number))).run()


if __name__ == "__main__":
    main()
