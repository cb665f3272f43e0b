"""Host memory that could still be allocated, from ``/proc`` and control groups.

Relies on ``proc_meminfo(5)`` and ``cgroups(7)``: version 2, and the memory controller of version 1. Their limits do
not refuse an allocation of a memory file: they kill a process that exceeds them, so the limit is checked first. The
numbers are estimates. Other processes may allocate the memory a moment later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared_store.base.errors import MemoryBackendError

UNLIMITED: Final = 1 << 62


@dataclass(frozen=True)
class _Hierarchy:
    """Mount point and file names of one version of control groups."""

    root: Path
    limit: str
    used: str
    cache: str
    """Line of ``memory.stat`` with bytes that count as used and are reclaimed when memory is needed."""


_VERSION_2 = _Hierarchy(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Hierarchy(
    Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)


def machine_free() -> int:
    """Return the bytes that the machine has available."""
    return _field(Path("/proc/meminfo"), "MemAvailable:") * 1024


def machine_total() -> int:
    """Return the bytes of the machine's memory."""
    return _field(Path("/proc/meminfo"), "MemTotal:") * 1024


def group_free() -> int:
    """Return the bytes left under the tightest limit of this process's control groups, else :data:`UNLIMITED`."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return UNLIMITED  # a system without control groups
    free = UNLIMITED
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            free = min(free, _free(_VERSION_2, path))
        elif "memory" in controllers.split(","):
            free = min(free, _free(_VERSION_1, path))
    return free


def _free(hierarchy: _Hierarchy, path: str) -> int:
    """Return the fewest bytes left in a group and its ancestors.

    In a container the path may be the host's: a directory that does not exist has no limit, and the root is the
    container's group.
    """
    group, free = hierarchy.root / path.lstrip("/"), UNLIMITED
    while True:
        limit = group / hierarchy.limit
        if limit.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
            used = int((group / hierarchy.used).read_text(encoding="ascii"))
            free = min(free, int(text) - used + _field(group / "memory.stat", hierarchy.cache))
        if group == hierarchy.root:
            return free
        group = group.parent


def _field(path: Path, name: str) -> int:
    """Return the number after a name, in a file of "name number" lines."""
    with path.open(encoding="ascii") as lines:
        for line in lines:
            found, number = line.split()[:2]
            if found == name:
                return int(number)
    raise MemoryBackendError(f"{path} has no line {name}")
