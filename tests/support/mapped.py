"""What the kernel says of the store's segments in host memory: in a process, and in the store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SegmentRange:
    """One mapping of a segment: addresses, and bytes that are the process's own because it wrote there."""

    start: int
    end: int
    private_bytes: int


def segment_ranges(pid: int | str = "self") -> list[SegmentRange]:
    """A process's mappings of segments in host memory, from its `smaps` (see `proc_pid_smaps(5)`)."""
    found: list[SegmentRange] = []
    place: tuple[int, int] | None = None
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            place = (start, end) if "/memfd:wooly" in line else None
        elif place is not None and head == "Anonymous:":
            found.append(SegmentRange(*place, int(rest[0]) * 1024))
    return found


def segment_bytes(pid: int) -> int:
    """Memory behind all segments that a process has fds of."""
    found: dict[int, int] = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if fd.readlink().name.startswith("memfd:wooly"):
                what = fd.stat()
                found[what.st_ino] = what.st_blocks * 512
        except FileNotFoundError:  # closed meanwhile
            continue
    return sum(found.values())


def own_bytes(pid: int) -> int:
    """Memory of a process that is backed by no file (`RssAnon` of `proc_pid_status(5)`)."""
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024
