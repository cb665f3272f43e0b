"""The manifest: the named tensors of one loaded model, and the engine's plain state.

A manifest names blobs by digest and has no locations: those are the store's. One entry of ``blobs`` is one storage of
the model. Two entries may have the same digest (equal but untied weights): the store has the bytes once, and a reader
gives each entry its own mapping, so that they stay untied.
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
"""Bytes of one element, by torch's name of the dtype without its prefix. Models with other dtypes are not shared."""

MAX_DIMENSIONS = 32


class Blob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Immutable bytes: their BLAKE3-256 and their number."""

    digest: bytes
    nbytes: int


class TensorEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One named tensor.

    Attributes:
        module: dotted path of its module; empty for the model itself.
        name: its name in the module.
        kind: how the module registers it.
        blob: index in the manifest's ``blobs``.
        dtype: a key of :data:`ITEM_SIZES`.
        shape: elements in each dimension.
        stride: elements between neighbours in each dimension, zero or more.
        offset: elements between the blob's first byte and the tensor's first element.
        alias: tensors with the same number are the same Python object (tied weights).
        persistent: True for a buffer in the module's state dict.
        requires_grad: the flag after loading.
        host: True for a small tensor in host memory, of a model on another device. Readers copy it to host memory.
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
        """Bytes from the blob's first byte to the end of the tensor's last element; 0 without elements."""
        if 0 in self.shape:
            return 0
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * ITEM_SIZES[self.dtype]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but the bytes that a reader needs to restore the publisher's model.

    Attributes:
        key: the weight key.
        name: the model's name, for people.
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
        """Bytes of a private copy of the model's tensors."""
        return sum(blob.nbytes for blob in self.blobs)


def encode(manifest: Manifest) -> bytes:
    """Encode as msgpack."""
    return msgspec.msgpack.encode(manifest)


_decoder = msgspec.msgpack.Decoder(Manifest)


def decode(data: bytes) -> Manifest:
    """Decode a manifest from an untrusted source.

    Raises:
        ProtocolError: it is not a manifest of this version, or a tensor exceeds its blob.
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
            raise ProtocolError("the manifest has a malformed blob")
    for entry in manifest.tensors:
        if entry.dtype not in ITEM_SIZES:
            raise ProtocolError(f"{entry.path}: unknown dtype {entry.dtype}")
        if not 0 <= entry.blob < len(manifest.blobs):
            raise ProtocolError(f"{entry.path}: blob {entry.blob} does not exist")
        if len(entry.shape) != len(entry.stride) or len(entry.shape) > MAX_DIMENSIONS:
            raise ProtocolError(f"{entry.path}: shape and stride do not match")
        if min((*entry.shape, *entry.stride, entry.offset, entry.alias)) < 0:
            raise ProtocolError(f"{entry.path}: a negative size, stride or offset")
        if entry.extent > manifest.blobs[entry.blob].nbytes:
            raise ProtocolError(f"{entry.path}: exceeds its blob")
