"""The manifest: the named tensors of one loaded model, and the plain state that the engine needs beside them.

A manifest says nothing of where bytes lie: it names blobs by digest, and the store says where they are. One entry of
``blobs`` stands for one storage that the model had. Two entries may have the same digest (equal but untied weights):
the store keeps the bytes once, and the reader gives each entry a mapping of its own, so that they stay untied.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from shared_store.base import digest
from shared_store.base.errors import ProtocolError

SCHEMA: Final = "wooly.manifest/1"

ITEM_SIZES: dict[str, int] = {
    "bfloat16": 2,
    "bool": 1,
    "complex128": 16,
    "complex64": 8,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "int8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "uint8": 1,
}
"""Bytes of one element, by torch's name of the dtype without its prefix. Other dtypes are not shared."""

MAX_DIMENSIONS = 32


class Blob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Immutable bytes: their BLAKE3-256 and how many there are."""

    digest: bytes
    nbytes: int


class TensorEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One named tensor.

    Attributes:
        module: dotted path of the module that has it; empty for the model itself.
        name: the name in that module.
        kind: how the module holds it.
        blob: index in the manifest's ``blobs``.
        dtype: a key of :data:`ITEM_SIZES`.
        shape: elements in each dimension.
        stride: elements from one to the next in each dimension, zero or more.
        offset: elements from the blob's first byte to the tensor's first element.
        alias: tensors with the same number are one Python object (tied weights).
        persistent: whether a buffer belongs to the module's state dict.
        requires_grad: as loading left it.
        host: a small tensor in host memory beside a model on another device; readers copy it there.
    """

    module: str
    name: str
    kind: Literal["parameter", "buffer", "attribute"]
    blob: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    alias: int
    persistent: bool = True
    requires_grad: bool = False
    host: bool = False

    @property
    def path(self) -> str:
        """The tensor's full dotted name."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def extent(self) -> int:
        """Bytes from the blob's first byte to the end of the tensor's last element; zero when it has none."""
        if 0 in self.shape:
            return 0
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * ITEM_SIZES[self.dtype]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that a reader needs, beside the bytes, to become what the publisher was.

    Attributes:
        key: the weight key that it answers.
        name: what people call the model.
        engine: ``vllm`` or ``transformers``, and its version.
        device: ``cpu``, or the kind of GPU.
        blobs: one for each storage.
        tensors: every parameter, buffer and tensor attribute.
        state: plain (JSON) state that loading left on the engine's objects.
    """

    schema: Literal["wooly.manifest/1"] = SCHEMA
    key: str
    name: str
    engine: str
    device: str
    blobs: tuple[Blob, ...]
    tensors: tuple[TensorEntry, ...]
    state: dict[str, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that a private copy of the model's tensors would take."""
        return sum(blob.nbytes for blob in self.blobs)


def encode(manifest: Manifest) -> bytes:
    """The manifest's msgpack form."""
    return msgspec.msgpack.encode(manifest)


_decoder = msgspec.msgpack.Decoder(Manifest)


def decode(data: bytes) -> Manifest:
    """Read a manifest, and believe nothing in it that was not checked.

    Raises:
        ProtocolError: it is not a manifest, or a tensor would reach outside its blob.
    """
    try:
        manifest = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise ProtocolError(f"not a manifest of this version ({SCHEMA}): {error}") from error
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    for blob in manifest.blobs:
        if len(blob.digest) != digest.SIZE or blob.nbytes < 0:
            raise ProtocolError("a manifest with a malformed blob")
    for entry in manifest.tensors:
        if entry.dtype not in ITEM_SIZES:
            raise ProtocolError(f"{entry.path}: unknown dtype {entry.dtype}")
        if not 0 <= entry.blob < len(manifest.blobs):
            raise ProtocolError(f"{entry.path}: there is no blob {entry.blob}")
        if len(entry.shape) != len(entry.stride) or len(entry.shape) > MAX_DIMENSIONS:
            raise ProtocolError(f"{entry.path}: shape and stride do not fit each other")
        if min((*entry.shape, *entry.stride, entry.offset, entry.alias)) < 0:
            raise ProtocolError(f"{entry.path}: a negative size, stride or offset")
        if entry.extent > manifest.blobs[entry.blob].nbytes:
            raise ProtocolError(f"{entry.path}: reaches outside its blob")
