"""Saving: write a resident model to a directory, completely or not at all. Existing content is never replaced."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

import shared_store
from shared_store.base import manifest as manifests
from shared_store.base.digest import digest
from shared_store.base.errors import ConfigError
from shared_store.base.manifest import Manifest
from shared_store.base.status import ModelStatus
from shared_store.client.session import Session
from shared_store.disk.description import DESCRIPTION, Description, SavedBlob, SavedFile, encode
from shared_store.disk.shards import SHARD_BYTES, Shard, index, shards
from shared_store.disk.staging import staged, sync
from shared_store.memory import backend_for
from shared_store.runtime.fds import OwnedFd
from shared_store.transfer.copier import Copier, Piece, Progress, copier_for, ignore_progress
from shared_store.transfer.files import OpenFile, disk_error
from shared_store.transfer.resident import ResidentModel, attach
from shared_store.transfer.verify import check
from shared_store.transfer.workers import Workers

_INDEX: Final = "model.safetensors.index.json"


def save(
    model: ResidentModel,
    copier: Copier,
    target: Path,
    progress: Progress = ignore_progress,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a mapped model. Does not check digests: see :func:`shared_store.transfer.verify.check`.

    Args:
        model: the mapped model.
        copier: the copier of its device.
        target: the directory to create; it may exist if it is empty.
        progress: called with bytes written.
        shard_bytes: file size from which on another file begins.

    Returns:
        Bytes written.

    Raises:
        ConfigError: the target exists and is not empty, or its parent does not exist.
        DiskError: the disk is full or the file system refuses. Nothing is left behind.
    """
    target = target.absolute()
    if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists already and is not replaced; choose another directory, or remove it")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no directory {target.parent} to save in")
    try:
        with staged(target) as directory:
            return _write(model, copier, directory, progress, shard_bytes)
    except OSError as error:
        raise disk_error(f"cannot save to {target}", error) from error


def _write(model: ResidentModel, copier: Copier, directory: Path, progress: Progress, shard_bytes: int) -> int:
    made = shards(model.manifest, shard_bytes)
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(_create(directory / shard.name, shard)) for shard in made]
        with Workers(copier, "save", progress) as workers:
            for file, shard in zip(files, made, strict=True):
                for found, offset in shard.offsets.items():
                    workers.put(Piece(file, offset, *model.spans[found]))
        for file in files:
            os.fsync(file.fd.fileno())
    if len(made) > 1:
        _write_small(directory / _INDEX, index(made))
    _write_small(directory / DESCRIPTION, encode(_description(model.manifest, made)))
    sync(directory)
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
        files=tuple(
            SavedFile(shard.name, shard.nbytes, len(shard.header), digest(shard.header).hex()) for shard in made
        ),
        blobs=tuple(
            SavedBlob(found.hex(), sizes[found], number, offset)
            for number, shard in enumerate(made)
            for found, offset in shard.offsets.items()
        ),
        manifest=manifests.encode(manifest),
    )


@contextlib.contextmanager
def _create(path: Path, shard: Shard) -> Iterator[OpenFile]:
    """Create a file of its final size, so that a full disk is detected before the copies, and write its header."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with OpenFile(str(path), OwnedFd(fd)) as file:
        os.posix_fallocate(fd, 0, shard.nbytes)
        file.write(0, memoryview(shard.header))
        yield file


def _write_small(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class Saved(msgspec.Struct, frozen=True):
    """The result of a save."""

    key: str
    name: str
    directory: str
    bytes: int
    seconds: float


def save_resident(
    session: Session,
    model: ModelStatus,
    target: Path,
    progress: Progress = ignore_progress,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Saved:
    """Attach to a committed model, verify its digests, and save it. Arguments as for :func:`save`.

    Raises:
        DigestMismatchError: a blob differs from its digest; nothing is written.
        ModelNotFoundError: the model is no longer in the store.
        ConfigError, DiskError: as :func:`save` raises.
    """
    began = time.perf_counter()
    backend = backend_for(model.device)
    with copier_for(backend) as copier, attach(session, model, backend) as resident:
        check(session, resident, copier)
        written = save(resident, copier, target, progress, shard_bytes=shard_bytes)
    return Saved(model.key, model.name, str(target.absolute()), written, time.perf_counter() - began)
