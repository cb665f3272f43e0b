"""``python -m shared_store.keeper [RUNTIME_DIR [READY_FD [OPTIONS [HANDOVER_FD]]]]``: a keeper, and its store.

:mod:`shared_store.runtime.spawn` runs it so. OPTIONS is a ``ServeOptions`` as JSON; without it the environment's
settings hold.
One byte is written to READY_FD: "1" once clients are served, "0" when the directory has a store already. HANDOVER_FD
brings what an earlier keeper had, options included.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import shared_store
from shared_store.base.errors import StoreRunningError, WoolyError
from shared_store.keeper.main import run, take_over
from shared_store.runtime.options import ServeOptions
from shared_store.runtime.spawn import CLAIMED, READY, report


def main() -> int:
    """Run the keeper; one line on stderr and the error's exit code when it cannot."""
    directory, ready_fd, given, handover_fd = [*sys.argv[1:], "", "", "", ""][:4]
    try:
        if handover_fd:
            _leave_directory()
            return take_over(int(handover_fd))
        options = ServeOptions.from_json(given)
        options = dataclasses.replace(options, runtime_dir=Path(directory or options.runtime_dir).absolute())
        _leave_directory()
        return run(options, ready=lambda: report(ready_fd, READY))
    except WoolyError as error:
        if isinstance(error, StoreRunningError):
            report(ready_fd, CLAIMED)
        print(f"wooly: {error} [{error.code}]", file=sys.stderr)  # noqa: T201 - this is a command
        return error.exit_code


def _leave_directory() -> None:
    """Nobody's process must not keep a file system busy. The stores that it starts find wooly all the same."""
    here = str(Path(shared_store.__file__).parents[1])
    if here == str(Path.cwd()):  # found because it was started there
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    os.chdir("/")


if __name__ == "__main__":
    sys.exit(main())
