"""The description of a saved model, ``wooly.json``: its format, and the checks on reading it.

Pure functions on bytes. Nothing in a description is trusted before it is checked: it contains a digest of itself and of
each file's header, and the blobs that it locates fill each file without gaps or overlaps. With the blobs' own digests,
which are checked when the blobs are read, a change of any byte that is read is detected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from shared_store.base import manifest as manifests
from shared_store.base.digest import SIZE, digest
from shared_store.base.errors import ProtocolError, SavedModelError
from shared_store.base.keys import is_key
from shared_store.base.manifest import Manifest

SCHEMA: Final = "wooly.saved/1"
DESCRIPTION: Final = "wooly.json"

MAX_BYTES: Final = 64 << 20
"""Most bytes of a description that is read."""

_MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the safetensors library
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


class SavedFile(msgspec.Struct, frozen=True):
    """A safetensors file.

    Attributes:
        name: plain file name.
        bytes: length.
        header_bytes: bytes before the first tensor.
        header_digest: digest of those bytes, in hexadecimal.
    """

    name: str
    bytes: int
    header_bytes: int
    header_digest: str


class SavedBlob(msgspec.Struct, frozen=True):
    """The location of a blob.

    Attributes:
        digest: the blob's digest, in hexadecimal.
        bytes: its size.
        file: index in the description's ``files``.
        offset: first byte in the file.
    """

    digest: str
    bytes: int
    file: int
    offset: int


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``wooly.json``.

    Attributes:
        schema: the format.
        wooly: the version that saved the model.
        saved_at: when it did, in seconds since the epoch.
        key: the weight key; with ``name``, ``engine`` and ``device`` repeated from the manifest for human readers.
        name: the model's name.
        engine: the engine and version that published it.
        device: the device it was saved from.
        files: the safetensors files.
        blobs: the location of each distinct blob.
        manifest: the encoded manifest, as it was committed.
    """

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
    """The file: an encoded description, and the digest (hexadecimal) of its bytes."""

    digest: str
    saved: msgspec.Raw


class _Schema(msgspec.Struct, frozen=True):
    """The field that every version of the format has."""

    schema: str


def encode(description: Description) -> bytes:
    """Return the content of ``wooly.json``."""
    saved = msgspec.json.encode(description)
    return msgspec.json.encode(_Sealed(digest(saved).hex(), msgspec.Raw(saved))) + b"\n"


def decode(text: bytes, directory: Path) -> Description:
    """Read the content of ``wooly.json``. ``directory`` is named in errors.

    Raises:
        SavedModelError: it is malformed, was changed, or has another version's format.
    """
    path = directory / DESCRIPTION
    try:
        sealed = msgspec.json.decode(text, type=_Sealed)
        schema = msgspec.json.decode(sealed.saved, type=_Schema).schema
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SavedModelError(f"{path} was not written by wooly: {error}") from error
    if digest(bytes(sealed.saved)).hex() != sealed.digest:
        raise SavedModelError(f"{path} was changed: its digest does not match")
    if schema != SCHEMA:
        raise SavedModelError(
            f"{directory} has format {schema[:50]!r}, and this version reads {SCHEMA}; save the model again"
        )
    try:
        return msgspec.json.decode(sealed.saved, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SavedModelError(f"{path} is malformed: {error}") from error


def manifest_of(description: Description, directory: Path) -> Manifest:
    """Return the manifest in a description.

    Raises:
        SavedModelError: it is malformed, or belongs to another model than the description.
    """
    try:
        manifest = manifests.decode(description.manifest)
    except ProtocolError as error:
        raise SavedModelError(f"{directory}: {error}") from error
    repeated = (description.key, description.name, description.engine, description.device)
    if repeated != (manifest.key, manifest.name, manifest.engine, manifest.device) or not is_key(manifest.key):
        raise SavedModelError(f"{directory}: the description and its manifest belong to different models")
    return manifest


def locations_of(description: Description, manifest: Manifest, directory: Path) -> dict[bytes, SavedBlob]:
    """Return the location of each blob, by digest.

    Raises:
        SavedModelError: entries are malformed, leave gaps or overlap in a file, or differ from the manifest's blobs.
    """
    _check_files(description.files, directory)
    ends = [file.header_bytes for file in description.files]
    locations: dict[bytes, SavedBlob] = {}
    for blob in sorted(description.blobs, key=lambda blob: (blob.file, blob.offset, blob.bytes)):
        if not 0 <= blob.file < len(ends) or blob.offset != ends[blob.file] or blob.bytes < 0:
            raise SavedModelError(
                f"{directory}: blob {blob.digest[:16]!r} is outside its file, overlaps another blob, or leaves a gap"
            )
        ends[blob.file] += blob.bytes
        locations[_digest(blob.digest, directory)] = blob
    if ends != [file.bytes for file in description.files] or len(locations) != len(description.blobs):
        raise SavedModelError(f"{directory}: the blobs do not fill the files exactly")
    if {digest: blob.bytes for digest, blob in locations.items()} != {
        blob.digest: blob.nbytes for blob in manifest.blobs
    }:
        raise SavedModelError(f"{directory}: the blobs are not those of the manifest")
    return locations


def _check_files(files: Sequence[SavedFile], directory: Path) -> None:
    for file in files:
        if not _FILE_NAME.fullmatch(file.name) or not 0 <= file.header_bytes <= min(file.bytes, _MAX_HEADER_BYTES):
            raise SavedModelError(f"{directory}: the entry for file {file.name[:100]!r} is malformed")
    if len({file.name for file in files}) < len(files):
        raise SavedModelError(f"{directory}: the description names a file twice")


def _digest(text: str, directory: Path) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != SIZE:
        raise SavedModelError(f"{directory}: {text[:20]!r} is not a digest")
    return found
