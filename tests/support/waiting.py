"""Waits with a deadline, and process facts from the kernel."""

from __future__ import annotations

import select
import time
from pathlib import Path


def wait_until(condition, what, timeout_s=15.0):
    """Poll until `condition()` is true; return its value. Fails with `what` after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s for: {what}")
        time.sleep(0.005)
    return found


def readable(file, timeout_s):
    """Return whether there is something to read (or an end of file) in time; None waits without limit.

    Unlike select(), poll() has no limit on file descriptors.
    """
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else timeout_s * 1000))


def process_state(pid):
    """Return the state letter of `proc_pid_stat(5)`: R, S, T (stopped), Z (zombie); empty if there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def open_fds(pid="self"):
    """Return the number of open fds of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def is_segment(fd, pid="self"):
    """Return whether a process's open fd is a segment in host memory; False for one that is closed."""
    try:
        return str(Path(f"/proc/{pid}/fd/{fd}").readlink()).startswith("/memfd:wooly")
    except FileNotFoundError:
        return False


def open_segments(pid="self"):
    """Return the number of a process's fds that are segments in host memory."""
    return sum(is_segment(entry.name, pid) for entry in Path(f"/proc/{pid}/fd").iterdir())
