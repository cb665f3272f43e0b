"""``python -m shared_store.daemon [RUNTIME_DIR [READY_FD [OPTIONS]]]``: a store in the foreground.

:mod:`shared_store.spawn` runs it so. OPTIONS is a ``ServeOptions`` as JSON; without it the environment's settings hold.
One byte is written to READY_FD: "1" once clients can connect, "0" when the directory has a store already. The command
line's imports are left out: they cost time.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from shared_store.daemon.main import run
from shared_store.daemon.options import ServeOptions
from shared_store.errors import StoreRunningError, WoolyError


def _path(kind: type, value: Any) -> Any:
    return kind(value) if kind is Path else value


def main() -> int:
    """Run the store; one line on stderr and the error's exit code when it cannot."""
    directory, ready_fd, given = [*sys.argv[1:], "", "", ""][:3]
    try:
        if given:
            options = msgspec.json.decode(given, type=ServeOptions, dec_hook=_path)
        else:
            options = ServeOptions.from_environment()
        if directory:
            options = dataclasses.replace(options, runtime_dir=Path(directory))
        return run(options, ready=lambda: _tell(ready_fd, b"1"))
    except WoolyError as error:
        if isinstance(error, StoreRunningError):
            _tell(ready_fd, b"0")
        print(f"wooly: {error} [{error.code}]", file=sys.stderr)  # noqa: T201 - this is a command
        return error.exit_code


def _tell(ready_fd: str, what: bytes) -> None:
    if ready_fd:
        os.chdir("/")  # a store that nobody watches must not keep a file system busy
        os.write(int(ready_fd), what)
        os.close(int(ready_fd))


if __name__ == "__main__":
    sys.exit(main())
