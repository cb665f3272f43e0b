"""The processes of a workload that have a GPU open.

Relies on ``/proc`` of this PID namespace. A process that uses CUDA has ``/dev/nvidia`` files open; one that is
checkpointed has none, so the list is made before.
"""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")
DEVICE = "/dev/nvidia"
"""Path that device files of GPUs begin with."""


def with_gpu(leader: int) -> list[int]:
    """Return the pids of a workload's processes that have a GPU open, ``leader`` first.

    These are ``leader``, its descendants, and its parent if that has a GPU open, too: an API server starts the process
    of its engine.
    """
    parents = _parents()
    family = [leader]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid and child not in family]
    family.append(parents.get(leader, 0))
    return [pid for pid in family if pid > 1 and has_gpu(pid)]


def runs(pid: int) -> bool:
    """Return True if a process has not ended."""
    return (_PROC / str(pid)).exists()


def has_gpu(pid: int) -> bool:
    """Return True if a process has a GPU open. False for one that ended, or is another user's."""
    try:
        descriptors = list((_PROC / str(pid) / "fd").iterdir())
    except OSError:
        return False
    return any(_target(descriptor).startswith(DEVICE) for descriptor in descriptors)


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:  # closed meanwhile
        return ""


def _parents() -> dict[int, int]:
    """Return the parent of every process that this one sees."""
    found = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it ended meanwhile
                continue
            found[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])  # proc(5): the name may contain blanks
    return found
