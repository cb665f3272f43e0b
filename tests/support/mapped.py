"""Mappings, descriptors and memory of processes, as the kernel reports them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SegmentRange:
    """A mapping of a segment: its addresses, and the bytes that are private because the process wrote to them."""

    start: int
    end: int
    private_bytes: int


def segment_ranges(pid: int | str = "self") -> list[SegmentRange]:
    """Return a process's mappings of segments in host memory, from `smaps` (see `proc_pid_smaps(5)`)."""
    found: list[SegmentRange] = []
    addresses: tuple[int, int] | None = None
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            addresses = (start, end) if "/memfd:wooly" in line else None
        elif addresses is not None and head == "Anonymous:":
            found.append(SegmentRange(*addresses, int(rest[0]) * 1024))
    return found


def resident_bytes(address: int, nbytes: int) -> int:
    """Return the bytes of an address range of this process that have pages (`Rss` of its mappings)."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = address <= start and end <= address + nbytes
        elif inside and head == "Rss:":
            total += int(rest[0]) * 1024
    return total


def flags_at(address: int) -> list[str]:
    """Return the `VmFlags` of the mapping of this process that has an address (see `proc_pid_smaps(5)`)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "VmFlags:":
            return rest
    raise AssertionError(f"{address:#x} is not mapped")


def segment_bytes(pid: int) -> int:
    """Return the bytes of all segments in host memory that a process has descriptors of."""
    found: dict[int, int] = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if fd.readlink().name.startswith("memfd:wooly"):
                status = fd.stat()
                found[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:  # closed since it was listed
            continue
    return sum(found.values())


def own_bytes(pid: int) -> int:
    """Return the anonymous memory of a process in bytes (`RssAnon` of `proc_pid_status(5)`)."""
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024
