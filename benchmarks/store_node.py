"""A store of one's own, what the kernel says of its process, and clients without torch: for measuring the store itself.

Relies on Linux's /proc. A model here is a key and blobs that are told by numbers; their bytes are the same everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from shared_store.base import digest
from shared_store.base.errors import WoolyError
from shared_store.base.manifest import Blob, Manifest, TensorEntry
from shared_store.base.status import Status
from shared_store.client.session import Session
from shared_store.memory import Access, Mapping, MemfdBackend
from shared_store.protocol import messages
from shared_store.runtime import spawn
from shared_store.runtime.fds import OwnedFds

HERE = Path(__file__).resolve().parent
PUBLISHER = "benchmark"
_backend = MemfdBackend()


@dataclass(frozen=True)
class Usage:
    """The store's process at one moment: bytes, seconds of CPU since its start, and counts."""

    rss: int
    anonymous: int
    cpu_s: float
    fds: int
    segments: int
    segment_bytes: int


class StoreNode:
    """A detached store in a directory of its own, which ends with the ``with`` block."""

    def __init__(self, options: str = "") -> None:
        """``options``: a ``ServeOptions`` as JSON, less its directory."""
        self.directory = Path(tempfile.mkdtemp(prefix="wooly-"))
        self._options = options

    def __enter__(self) -> Self:
        try:
            spawn.start(self.directory, self._options, timeout_s=30.0)
            with self.session() as session:
                self.pid = session.store_pid
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(WoolyError), self.session() as session:
                session.shutdown_store()
            wait_until(lambda: not Path(f"/proc/{self.pid}").exists(), "the store to end")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def session(self, name: str = PUBLISHER, timeout_s: float = 30.0) -> Session:
        """A connection to it."""
        return Session.connect(self.directory, name=name, autostart=False, timeout_s=timeout_s)

    def usage(self) -> Usage:
        """What the kernel says of the store's process."""
        process = Path(f"/proc/{self.pid}")
        fields = dict(line.split(":", 1) for line in (process / "status").read_text(encoding="utf-8").splitlines())
        times = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        sizes = []
        fds = list((process / "fd").iterdir())
        for fd in fds:
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                if str(fd.readlink()).startswith("/memfd:wooly"):
                    sizes.append(fd.stat().st_size)
        return Usage(
            rss=int(fields["VmRSS"].split()[0]) * 1024,
            anonymous=int(fields["RssAnon"].split()[0]) * 1024,
            cpu_s=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
            fds=len(fds),
            segments=len(sizes),
            segment_bytes=sum(sizes),
        )


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Poll until the condition holds. Raises :class:`TimeoutError` that names what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.01)


def wait_for_status(
    session: Session, condition: Callable[[Status], object], what: str, timeout_s: float = 30.0
) -> Status:
    """Poll the status until the condition holds of it; returns that one."""
    found = [session.status()]

    def holds() -> object:
        found[0] = session.status()
        return condition(found[0])

    wait_until(holds, what, timeout_s)
    return found[0]


def key(number: int) -> str:
    """A weight key."""
    return f"{number:064x}"


@cache
def content(number: int, nbytes: int) -> bytes:
    """The bytes of a blob."""
    return random.Random(number).randbytes(nbytes)


@cache
def blob(number: int, nbytes: int) -> Blob:
    """What a manifest says of them."""
    return Blob(digest.digest(content(number, nbytes)), nbytes)


def manifest(model: str, blobs: Sequence[Blob]) -> Manifest:
    """One uint8 tensor for each blob."""
    tensors = tuple(
        TensorEntry(f"layers.{index}.mlp", "weight", "parameter", index, "uint8", (one.nbytes,), (1,), 0, index)
        for index, one in enumerate(blobs)
    )
    return Manifest(
        key=model, name=f"model-{model[-4:]}", engine=PUBLISHER, device="cpu", blobs=tuple(blobs), tensors=tensors
    )


def open_model(
    session: Session, model: str, *, publish: bool = True, timeout_s: float = 60.0
) -> tuple[messages.Attached, OwnedFds] | None:
    """What :meth:`Session.open` says of a model on the CPU."""
    return session.open(
        model, name=f"model-{model[-4:]}", engine=PUBLISHER, device="cpu", publish=publish, timeout_s=timeout_s
    )


@contextlib.contextmanager
def mapped(segments: Sequence[messages.SegmentInfo], fds: OwnedFds, access: Access) -> Iterator[list[Mapping]]:
    """The segments of a reply, mapped for as long as the block runs. Takes the fds."""
    made: list[Mapping] = []
    try:
        with fds:
            for segment, fd in zip(segments, fds.filenos(), strict=True):
                made.append(Mapping(_backend, _backend.import_fd(fd, segment.nbytes)))
                made[-1].map(access)
        yield made
    finally:
        for mapping in made:
            mapping.close()


def fill(session: Session, model: str, planned: messages.Planned, parts: Sequence[tuple[int, int]]) -> None:
    """Write the blobs of a plan that are new; ``parts`` are their numbers and sizes, in the plan's order."""
    for index, segment in enumerate(planned.segments):
        if not segment.promised:
            continue
        fds = OwnedFds([session.fill(model, segment.id)])
        with mapped((segment,), fds, Access.WRITE) as (mapping,):
            for place, (number, nbytes) in zip(planned.places, parts, strict=True):
                if place.new and place.segment == index:
                    ctypes.memmove(mapping.address + place.offset, content(number, nbytes), nbytes)


def publish(session: Session, model: str, parts: Sequence[tuple[int, int]]) -> None:
    """Load and publish a model that was granted; the session reads it then."""
    blobs = [blob(*part) for part in parts]
    planned, fds = session.plan(model, blobs)
    close_all(fds)
    fill(session, model, planned, parts)
    close_all(session.commit(manifest(model, blobs))[1])


def close_all(fds: OwnedFds) -> None:
    """Close fds that are not needed."""
    fds.close()


def versions() -> dict[str, Any]:
    """What was measured, and where."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    ).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": os.environ.get("WOOLY_COMMIT") or commit or "unknown",
        "cpu": next(line for line in lines if "model name" in line).split(":")[1].strip(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "wooly": metadata.version("wooly"),
        "load_average": os.getloadavg()[0],  # what else the machine did when this was asked
    }
