"""How much host memory could still be allocated, as the kernel tells in ``/proc`` and in control groups.

Relies on ``proc_meminfo(5)`` and ``cgroups(7)``: version 2, and version 1's memory controller, whose limits kill who
passes them with a memory file instead of refusing. Does not promise: that the room is still there a moment later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared_store.base.errors import MemoryBackendError

UNLIMITED: Final = 1 << 62


@dataclass(frozen=True)
class _Hierarchy:
    """Where control groups of a version are, and what their files are called."""

    root: Path
    limit: str
    used: str
    cache: str
    """Line of ``memory.stat`` with bytes that count as used, and are given up when room is asked for."""


_VERSION_2 = _Hierarchy(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Hierarchy(
    Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)


def machine_free() -> int:
    """Bytes that the machine could still give."""
    return _field(Path("/proc/meminfo"), "MemAvailable:") * 1024


def group_free() -> int:
    """Bytes under the nearest limit of this process's control groups; :data:`UNLIMITED` where there is none."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return UNLIMITED  # no control groups here
    room = UNLIMITED
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            room = min(room, _free(_VERSION_2, path))
        elif "memory" in controllers.split(","):
            room = min(room, _free(_VERSION_1, path))
    return room


def _free(hierarchy: _Hierarchy, path: str) -> int:
    """The least room of a group and those that it is in.

    In a container the path may be the host's: what is not there has no limit, and the root is the container's group.
    """
    group, room = hierarchy.root / path.lstrip("/"), UNLIMITED
    while True:
        limit = group / hierarchy.limit
        if limit.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
            used = int((group / hierarchy.used).read_text(encoding="ascii"))
            room = min(room, int(text) - used + _field(group / "memory.stat", hierarchy.cache))
        if group == hierarchy.root:
            return room
        group = group.parent


def _field(path: Path, name: str) -> int:
    """The number behind a name, in a file of "name number" lines."""
    with path.open(encoding="ascii") as lines:
        for line in lines:
            found, number = line.split()[:2]
            if found == name:
                return int(number)
    raise MemoryBackendError(f"{path} has no {name}")
