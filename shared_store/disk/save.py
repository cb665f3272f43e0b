"""Writing a model that the store has to a directory: all of it or nothing, and never in place of something else.

Files grow in a hidden directory beside the target, which gets its name when everything is on the disk. Whoever is
killed before leaves such a directory behind, unlocked; the next save to the same target removes it.

Relies on ``rename(2)`` refusing to replace a directory that is not empty, and on ``flock(2)`` ending with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

import shared_store
from shared_store.base import manifest as manifests
from shared_store.base.digest import digest
from shared_store.base.errors import ConfigError
from shared_store.base.manifest import Manifest
from shared_store.base.status import ModelStatus
from shared_store.client.session import Session
from shared_store.disk.saved import DESCRIPTION, Description, SavedBlob, SavedFile, encode
from shared_store.disk.shards import SHARD_BYTES, Shard, index, shards
from shared_store.disk.verify import check
from shared_store.memory import backend_for
from shared_store.transfer.copier import Copier, Piece, Progress, copier_for, unheard
from shared_store.transfer.files import OpenFile, close_all, refused
from shared_store.transfer.reading import Holding, reading
from shared_store.transfer.workers import Workers

_INDEX = "model.safetensors.index.json"


def save(
    holding: Holding, copier: Copier, target: Path, progress: Progress = unheard, *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a model.

    Args:
        holding: the model, mapped, and checked by the caller (see :func:`shared_store.disk.verify.check`).
        copier: of its device.
        target: the directory to make; it may be there if it is empty.
        progress: called with bytes written.
        shard_bytes: after which another file begins.

    Returns:
        Bytes written.

    Raises:
        ConfigError: the target is there and not empty, or its parent is not there.
        DiskError: no room, or the file system refuses. Nothing is left of it.
    """
    target = target.absolute()
    if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        raise ConfigError(f"{target} is there already, and is not replaced; name another directory, or remove it")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no directory {target.parent} to save in")
    try:
        with _unfinished(target) as directory:
            written = _write(holding, copier, directory, progress, shard_bytes)
            directory.rename(target)
            _sync(target.parent)
    except OSError as error:
        raise refused(f"cannot save to {target}", error) from error
    return written


def _write(holding: Holding, copier: Copier, directory: Path, progress: Progress, shard_bytes: int) -> int:
    made = shards(holding.manifest, shard_bytes)
    files: list[OpenFile] = []
    try:
        files.extend(_create(directory / shard.name, shard) for shard in made)
        with Workers(copier, "save", progress) as workers:
            for file, shard in zip(files, made, strict=True):
                for found, offset in shard.offsets.items():
                    workers.put(Piece(file, offset, *holding.spans[found]))
        for file in files:
            os.fsync(file.fd)
    finally:
        close_all(files)
    if len(made) > 1:
        _write_small(directory / _INDEX, index(made))
    _write_small(directory / DESCRIPTION, encode(_description(holding.manifest, made)))
    _sync(directory)
    return sum(shard.nbytes for shard in made)


def _description(manifest: Manifest, made: Sequence[Shard]) -> Description:
    sizes = {blob.digest: blob.nbytes for blob in manifest.blobs}
    return Description(
        wooly=shared_store.__version__,
        saved_at=time.time(),
        key=manifest.key,
        name=manifest.name,
        engine=manifest.engine,
        device=manifest.device,
        files=tuple(SavedFile(one.name, one.nbytes, len(one.header), digest(one.header).hex()) for one in made),
        blobs=tuple(
            SavedBlob(found.hex(), sizes[found], number, offset)
            for number, shard in enumerate(made)
            for found, offset in shard.offsets.items()
        ),
        manifest=manifests.encode(manifest),
    )


def _create(path: Path, shard: Shard) -> OpenFile:
    """A new file with all of its room, so that a full disk shows before the work, and its header."""
    file = OpenFile(str(path), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        os.posix_fallocate(file.fd, 0, shard.nbytes)
        file.write(0, memoryview(shard.header))
    except BaseException:
        os.close(file.fd)
        raise
    return file


def _write_small(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A new hidden directory beside the target, locked; gone after the block, unless it was renamed."""
    prefix = f".{target.name}.unfinished-"
    sweep(target.parent, prefix)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        fd = _lock(directory)
        if fd is not None and directory.is_dir():
            break
        if fd is not None:  # somebody swept it before it was locked
            os.close(fd)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # what cannot be removed is swept the next time
        os.close(fd)


def sweep(parent: Path, prefix: str) -> None:
    """Remove unfinished directories whose makers are gone."""
    for found in parent.iterdir():
        if found.name.startswith(prefix) and found.is_dir() and not found.is_symlink():
            fd = _lock(found)
            if fd is not None:
                shutil.rmtree(found, ignore_errors=True)
                os.close(fd)


def _lock(directory: Path) -> int | None:
    """Lock a directory for this process: an fd that holds the lock, or None where another has it or it is gone."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


class Saved(msgspec.Struct, frozen=True):
    """What was saved, and where to."""

    key: str
    name: str
    directory: str
    bytes: int
    seconds: float


def save_resident(
    session: Session, model: ModelStatus, target: Path, progress: Progress = unheard, *, shard_bytes: int = SHARD_BYTES
) -> Saved:
    """Check and save a model of the store, being its reader meanwhile. Raises as :func:`save` and ``check`` do."""
    began = time.perf_counter()
    backend = backend_for(model.device)
    with copier_for(backend) as copier, reading(session, model, backend) as holding:
        check(session, holding, copier)
        written = save(holding, copier, target, progress, shard_bytes=shard_bytes)
    return Saved(model.key, model.name, str(target.absolute()), written, time.perf_counter() - began)
