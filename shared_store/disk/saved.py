"""A saved model: a directory with safetensors files and a description (``wooly.json``), opened for restoring.

All files are opened with the directory, by plain names and without following links, so the files that are read later
are those that were checked, even if the directory is replaced or removed meanwhile. See
:mod:`shared_store.disk.description` for the checks.

Does not promise that the model belongs to its key: a user who can write to the directory can describe other weights
under the same key, like any client that may publish.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from shared_store.base.digest import digest
from shared_store.base.errors import SavedModelError
from shared_store.disk.description import DESCRIPTION, MAX_BYTES, SavedFile, decode, locations_of, manifest_of
from shared_store.runtime.fds import OwnedFd
from shared_store.transfer.copier import Piece, Span
from shared_store.transfer.files import OpenFile


class SavedModel:
    """An open saved model, the source of its blobs. A context manager that closes the files."""

    def __init__(self, directory: Path) -> None:
        """Open the files and check everything but the blobs.

        Raises:
            SavedModelError: the directory is not a saved model, is incomplete, was changed, or has another version's
                format.
        """
        self.directory = directory
        try:
            folder = OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            raise SavedModelError(f"cannot open {directory}: {error.strerror}") from error
        with folder, contextlib.ExitStack() as opened:
            self.description = decode(_read_description(folder, directory), directory)
            self.manifest = manifest_of(self.description, directory)
            self.locations = locations_of(self.description, self.manifest, directory)
            self.files: list[OpenFile] = []
            for file in self.description.files:
                self.files.append(opened.enter_context(_open(folder, file.name, directory)))
                _check_header(self.files[-1], file)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._opened.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.description.files)

    def piece(self, digest: bytes, span: Span) -> Piece:
        """Return the copy of a blob from its file to a span of memory."""
        location = self.locations[digest]
        return Piece(self.files[location.file], location.offset, *span)

    def mismatch(self, digest: bytes, actual: bytes) -> SavedModelError:
        """Return the error for a blob that was read with another digest than it was saved with."""
        location = self.locations[digest]
        return SavedModelError(
            f"{self.files[location.file].name} was changed: its {location.bytes} bytes from {location.offset} on have "
            f"digest {actual.hex()[:16]}, and were saved with {digest.hex()[:16]}"
        )


def _read_description(folder: OwnedFd, directory: Path) -> bytes:
    with _open(folder, DESCRIPTION, directory) as file:
        nbytes = file.size()
        if nbytes > MAX_BYTES:
            raise SavedModelError(f"{file.name} has {nbytes} bytes; at most {MAX_BYTES} are read")
        text = bytearray(nbytes)
        file.read(0, memoryview(text))
        return bytes(text)


def _open(folder: OwnedFd, name: str, directory: Path) -> OpenFile:
    """Open a regular file in the directory itself."""
    path = str(directory / name)
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = OpenFile(path, OwnedFd(os.open(name, flags, dir_fd=folder.fileno())))
    except FileNotFoundError as error:
        raise SavedModelError(f"{directory} is not a saved model: it has no {name}") from error
    except OSError as error:
        raise SavedModelError(f"cannot open {path}: {error.strerror} (links are not followed)") from error
    if not stat.S_ISREG(os.fstat(file.fd.fileno()).st_mode):
        file.close()
        raise SavedModelError(f"{path} is not a regular file")
    return file


def _check_header(opened: OpenFile, file: SavedFile) -> None:
    actual = opened.size()
    if actual != file.bytes:
        raise SavedModelError(f"{opened.name} has {actual} bytes and was saved with {file.bytes}")
    header = bytearray(file.header_bytes)
    opened.read(0, memoryview(header))
    if digest(header).hex() != file.header_digest:
        raise SavedModelError(f"{opened.name} was changed: its header is not the one that was saved")
