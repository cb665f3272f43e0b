"""``python -m shared_store.daemon [RUNTIME_DIR [READY_FD [OPTIONS [CONTROL_FD]]]]``: a store in the foreground.

Its keeper runs it so, and says all the rest over the socket CONTROL_FD; the directory is for people who look at
processes. Without CONTROL_FD it is a store without a keeper: OPTIONS is a ``ServeOptions`` as JSON, or the
environment's settings hold, and one byte is written to READY_FD: "1" once clients can connect, "0" when the directory
has a store already. The command line's imports are left out: they cost time.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from shared_store.base.errors import StoreRunningError, WoolyError
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.spawn import CLAIMED, READY, report
from shared_store.store.app import run, run_kept


def main() -> int:
    """Run the store; one line on stderr and the error's exit code when it cannot."""
    directory, ready_fd, given, control_fd = [*sys.argv[1:], "", "", "", ""][:4]
    try:
        if control_fd:
            return run_kept(int(control_fd))
        options = ServeOptions.from_json(given)
        if directory:
            options = dataclasses.replace(options, runtime_dir=Path(directory))
        return run(options, ready=lambda: _report(ready_fd, READY))
    except WoolyError as error:
        if isinstance(error, StoreRunningError):
            _report(ready_fd, CLAIMED)
        print(f"wooly: {error} [{error.code}]", file=sys.stderr)  # noqa: T201 - this is a command
        return error.exit_code


def _report(ready_fd: str, outcome: bytes) -> None:
    if ready_fd:
        os.chdir("/")  # a detached store must not keep a file system busy
        report(ready_fd, outcome)


if __name__ == "__main__":
    sys.exit(main())
