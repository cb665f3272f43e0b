"""A saved model: a directory with safetensors files, and ``wooly.json``, which says all that restoring needs.

Nothing in the directory is believed that was not checked. Files are opened when the directory is, by plain names and
without following links, so what is read later is what was looked at, even if the directory is replaced or removed
meanwhile. The description has a digest of itself and of each file's header, and the blobs that it places, whose digests
are checked as they come in, leave no byte of a file over. So a change of any byte that is read is found.

Does not promise that the model is what its key says: who can write the directory can describe another model under that
key, as anybody can who may publish.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import msgspec

from shared_store.base import manifest as manifests
from shared_store.base.digest import SIZE, digest
from shared_store.base.errors import ProtocolError, SavedModelError
from shared_store.base.keys import is_key
from shared_store.base.manifest import Manifest
from shared_store.transfer.files import OpenFile, close_all

SCHEMA: Final = "wooly.saved/1"
DESCRIPTION: Final = "wooly.json"

_MAX_DESCRIPTION: Final = 64 << 20
_MAX_HEADER: Final = 100_000_000  # safetensors' own limit
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


class SavedFile(msgspec.Struct, frozen=True):
    """One safetensors file. ``header_bytes``: up to the first tensor; ``header_digest`` in hexadecimal."""

    name: str
    bytes: int
    header_bytes: int
    header_digest: str


class SavedBlob(msgspec.Struct, frozen=True):
    """Where the blob with a digest (hexadecimal) is: index of its file, and first byte there."""

    digest: str
    bytes: int
    file: int
    offset: int


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What ``wooly.json`` tells. ``manifest``: the store's, as it was committed; some of it again, for people."""

    schema: Literal["wooly.saved/1"] = SCHEMA
    wooly: str
    saved_at: float
    key: str
    name: str
    engine: str
    device: str
    files: tuple[SavedFile, ...]
    blobs: tuple[SavedBlob, ...]
    manifest: bytes


class _Sealed(msgspec.Struct, frozen=True):
    """The file: a description, and the digest (hexadecimal) of its bytes as they stand there."""

    digest: str
    saved: msgspec.Raw


class _Schema(msgspec.Struct, frozen=True):
    """As much as every version has."""

    schema: str


def encode(description: Description) -> bytes:
    """The content of ``wooly.json``."""
    saved = msgspec.json.encode(description)
    return msgspec.json.encode(_Sealed(digest(saved).hex(), msgspec.Raw(saved))) + b"\n"


class SavedModel:
    """A saved model whose files are open. To be closed."""

    def __init__(self, directory: Path) -> None:
        """Open and check all but the blobs.

        Raises:
            SavedModelError: it is no saved model, not whole, was changed, or is of another version.
        """
        self.directory = directory
        self.files: tuple[OpenFile, ...] = ()
        try:
            folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SavedModelError(f"cannot open {directory}: {error.strerror}") from error
        opened: list[OpenFile] = []
        try:
            text = self._read_description(folder)
            self.description = _decode(text, directory)
            self.manifest = _manifest(self.description, directory)
            self.places = _places(self.description, self.manifest, directory)
            for file in self.description.files:
                opened.append(_open(folder, file.name, directory))
                self._check_file(opened[-1], file)
        except BaseException:
            close_all(opened)
            raise
        finally:
            os.close(folder)
        self.files = tuple(opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Idempotent."""
        files, self.files = self.files, ()
        close_all(files)

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.bytes for file in self.description.files)

    @staticmethod
    def _check_file(opened: OpenFile, file: SavedFile) -> None:
        actual = os.fstat(opened.fd).st_size
        if actual != file.bytes:
            raise SavedModelError(f"{opened.name} has {actual} bytes and was saved with {file.bytes}")
        header = bytearray(file.header_bytes)
        opened.read(0, memoryview(header))
        if digest(header).hex() != file.header_digest:
            raise SavedModelError(f"{opened.name} was changed: its header is not the one that was saved")

    def _read_description(self, folder: int) -> bytes:
        file = _open(folder, DESCRIPTION, self.directory)
        try:
            nbytes = os.fstat(file.fd).st_size
            if nbytes > _MAX_DESCRIPTION:
                raise SavedModelError(f"{file.name} has {nbytes} bytes, which no saved model needs")
            text = bytearray(nbytes)
            file.read(0, memoryview(text))
            return bytes(text)
        finally:
            close_all([file])


def _open(folder: int, name: str, directory: Path) -> OpenFile:
    """Open a regular file of the directory itself."""
    shown = str(directory / name)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError as error:
        raise SavedModelError(f"{directory} is no saved model: there is no {name}") from error
    except OSError as error:
        raise SavedModelError(f"cannot open {shown}: {error.strerror} (links are not followed)") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SavedModelError(f"{shown} is not a regular file")
    return OpenFile(shown, fd)


def _decode(text: bytes, directory: Path) -> Description:
    try:
        sealed = msgspec.json.decode(text, type=_Sealed)
        found = msgspec.json.decode(sealed.saved, type=_Schema).schema
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SavedModelError(f"{directory / DESCRIPTION} is not wooly's: {error}") from error
    if digest(bytes(sealed.saved)).hex() != sealed.digest:
        raise SavedModelError(f"{directory / DESCRIPTION} was changed: its digest is another one")
    if found != SCHEMA:
        raise SavedModelError(
            f"{directory} is of format {found[:50]!r}, and this version reads {SCHEMA}; save it again"
        )
    try:
        return msgspec.json.decode(sealed.saved, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SavedModelError(f"{directory / DESCRIPTION} is malformed: {error}") from error


def _manifest(description: Description, directory: Path) -> Manifest:
    try:
        manifest = manifests.decode(description.manifest)
    except ProtocolError as error:
        raise SavedModelError(f"{directory}: {error}") from error
    told = (description.key, description.name, description.engine, description.device)
    if told != (manifest.key, manifest.name, manifest.engine, manifest.device) or not is_key(manifest.key):
        raise SavedModelError(f"{directory}: the description and its manifest are of different models")
    return manifest


def _places(description: Description, manifest: Manifest, directory: Path) -> dict[bytes, SavedBlob]:
    """The place of each blob; every byte of every file is accounted for, and none twice."""
    for file in description.files:
        if not _FILE_NAME.fullmatch(file.name) or not 0 <= file.header_bytes <= min(file.bytes, _MAX_HEADER):
            raise SavedModelError(f"{directory}: a malformed entry for file {file.name[:100]!r}")
    if len({file.name for file in description.files}) < len(description.files):
        raise SavedModelError(f"{directory}: a file is described twice")
    ends = [file.header_bytes for file in description.files]
    places: dict[bytes, SavedBlob] = {}
    for blob in sorted(description.blobs, key=lambda blob: (blob.file, blob.offset, blob.bytes)):
        if not 0 <= blob.file < len(ends) or blob.offset != ends[blob.file] or blob.bytes < 0:
            raise SavedModelError(f"{directory}: blob {blob.digest[:16]!r} lies outside its file, or over another blob")
        ends[blob.file] += blob.bytes
        places[_digest(blob.digest, directory)] = blob
    if ends != [file.bytes for file in description.files] or len(places) != len(description.blobs):
        raise SavedModelError(f"{directory}: the blobs are not what the files hold")
    _check_complete(places, manifest, directory)
    return places


def _check_complete(places: dict[bytes, SavedBlob], manifest: Manifest, directory: Path) -> None:
    wanted = {blob.digest: blob.nbytes for blob in manifest.blobs}
    if {digest: blob.bytes for digest, blob in places.items()} != wanted:
        raise SavedModelError(f"{directory}: the blobs are not those of the manifest")


def _digest(text: str, directory: Path) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError as error:
        raise SavedModelError(f"{directory}: {text[:20]!r} is no digest") from error
    if len(found) != SIZE:
        raise SavedModelError(f"{directory}: {text[:20]!r} is no digest")
    return found
