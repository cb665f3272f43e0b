"""Command line of the keeper and of the store: ``[RUNTIME_DIR [READY_FD [OPTIONS [INHERITED_FD]]]]``.

* RUNTIME_DIR: the runtime directory; empty: as in the options.
* READY_FD: a pipe. One byte is written to it: "1" once clients can connect, "0" if the directory has a store already.
* OPTIONS: a ``ServeOptions`` as JSON; empty: from the environment.
* INHERITED_FD: the connection or the memfd that the rest comes from; empty: none.

A process of one version starts a process of another with these arguments, so they do not change. Typer is not used
because its import takes longer than a store's start should.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from shared_store.base.errors import StoreRunningError, WoolyError
from shared_store.runtime.fds import OwnedFd
from shared_store.runtime.options import ServeOptions

READY: Final = b"1"
"""Byte for the starter: clients can connect."""

RUNNING: Final = b"0"
"""Byte for the starter: the runtime directory has a store already."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line."""

    runtime_dir: str = ""
    ready: OwnedFd | None = None
    options: str = ""
    inherited: OwnedFd | None = None

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Arguments:
        """Parse the arguments after the program's name. Takes over the fds that they name."""
        directory, ready, options, inherited = [*argv[1:], "", "", "", ""][:4]
        return cls(directory, _inherited(ready), options, _inherited(inherited))

    def serve_options(self) -> ServeOptions:
        """Return the options, with the runtime directory of the command line if it has one."""
        options = ServeOptions.from_json(self.options)
        return dataclasses.replace(options, runtime_dir=Path(self.runtime_dir)) if self.runtime_dir else options

    def report_ready(self) -> None:
        """Tell the starter that clients can connect."""
        self._report(READY)

    def report_running(self) -> None:
        """Tell the starter that the runtime directory has a store already."""
        self._report(RUNNING)

    def _report(self, answer: bytes) -> None:
        if self.ready is not None and not self.ready.closed:
            os.chdir("/")  # a detached process must keep no file system busy
            with self.ready:
                os.write(self.ready.fileno(), answer)


def exit_code(arguments: Arguments, run: Callable[[], int]) -> int:
    """Run a process to its end. On an error, report it to the starter and on stderr, and return its exit code."""
    try:
        return run()
    except WoolyError as error:
        if isinstance(error, StoreRunningError):
            arguments.report_running()
        print(f"wooly: {error} [{error.code}]", file=sys.stderr)  # noqa: T201 - this is a command
        return error.exit_code


def _inherited(number: str) -> OwnedFd | None:
    return OwnedFd(int(number)) if number else None
