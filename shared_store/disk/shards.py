"""Shards: the layout of a model's blobs in safetensors files, as pure functions of the manifest.

The format is https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, then the bytes of the
tensors without gaps. Each distinct blob is stored once. A contiguous tensor that fills its blob is stored as that
tensor, so that any safetensors reader finds it by name. Any other blob is stored as plain bytes, named after a tensor
in it. Further names of the same tensor are in the header's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shared_store.base.manifest import ITEM_SIZES, Manifest, TensorEntry

SHARD_BYTES: Final = 4 << 30
"""Size in bytes from which on another file begins."""

DTYPES: Final = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "uint8": "U8",
}
"""Dtypes that every safetensors reader supports. Readers refuse a file with another one: those are stored as bytes."""

_HEADER_MULTIPLE: Final = 8


@dataclass(frozen=True)
class Shard:
    """A file. ``header``: its first bytes; ``offsets``: first byte in the file of each blob, by digest."""

    name: str
    header: bytes
    offsets: dict[bytes, int]
    nbytes: int


@dataclass(frozen=True)
class _Stored:
    """A blob as an entry of a file; ``alignment`` in bytes."""

    digest: bytes
    nbytes: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    alignment: int


def shards(manifest: Manifest, target: int = SHARD_BYTES) -> list[Shard]:
    """Divide a model's blobs into files of about ``target`` bytes, in the order of the manifest."""
    groups: list[list[_Stored]] = [[]]
    for stored in _stored(manifest):
        if groups[-1] and sum(entry.nbytes for entry in groups[-1]) + stored.nbytes > target:
            groups.append([])
        groups[-1].append(stored)
    aliases = _aliases(manifest, {entry.digest: entry for group in groups for entry in group})
    made = []
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Readers use the bytes in place, so larger elements come first: each tensor is then aligned.
        made.append(_shard(name, sorted(group, key=lambda entry: -entry.alignment), aliases))
    return made


def index(made: list[Shard]) -> bytes:
    """Return the index file: the shard of each tensor, in the form that transformers reads."""
    weight_map = {name: shard.name for shard in made for name in _names(shard)}
    total = sum(shard.nbytes - len(shard.header) for shard in made)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()


def _shard(name: str, group: list[_Stored], aliases: Mapping[str, str]) -> Shard:
    here = {entry.name for entry in group}
    metadata = {"format": "pt", "wooly.aliases": json.dumps({a: b for a, b in aliases.items() if b in here})}
    header: dict[str, Any] = {"__metadata__": metadata}
    starts: dict[bytes, int] = {}
    end = 0
    for entry in group:
        starts[entry.digest] = end
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (end, end + entry.nbytes)}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_MULTIPLE)
    head = len(text).to_bytes(8, "little") + text
    return Shard(name, head, {digest: len(head) + start for digest, start in starts.items()}, len(head) + end)


def _names(shard: Shard) -> Iterator[str]:
    return (name for name in json.loads(shard.header[8:]) if name != "__metadata__")


def _stored(manifest: Manifest) -> Iterator[_Stored]:
    """Yield each distinct blob once."""
    users: dict[bytes, list[TensorEntry]] = {blob.digest: [] for blob in manifest.blobs}
    sizes = {blob.digest: blob.nbytes for blob in manifest.blobs}
    for entry in manifest.tensors:
        users[manifest.blobs[entry.blob].digest].append(entry)
    taken = {"__metadata__"}
    for digest, entries in users.items():
        nbytes = sizes[digest]
        whole = next((entry for entry in entries if _is_whole(entry, nbytes)), None)
        if whole is not None:
            name, dtype, shape, alignment = whole.path, DTYPES[whole.dtype], whole.shape, ITEM_SIZES[whole.dtype]
        else:
            name = f"{entries[0].path if entries else 'unnamed'}#bytes"
            dtype, shape, alignment = "U8", (nbytes,), 1
        if name in taken:  # for example of a module with a dot in its name
            name = f"{name}#{digest.hex()}"
        taken.add(name)
        yield _Stored(digest, nbytes, name, dtype, shape, alignment)


def _is_whole(entry: TensorEntry, nbytes: int) -> bool:
    """Return whether a tensor fills its blob, is contiguous, and has a dtype of safetensors."""
    elements = 1
    for size, step in zip(reversed(entry.shape), reversed(entry.stride), strict=True):
        if size != 1 and step != elements and 0 not in entry.shape:
            return False
        elements *= size
    return entry.dtype in DTYPES and not entry.offset and elements * ITEM_SIZES[entry.dtype] == nbytes


def _aliases(manifest: Manifest, stored: Mapping[bytes, _Stored]) -> dict[str, str]:
    """Return further names of stored tensors with the same bytes, dtype and shape, each with the stored name."""
    found: dict[str, str] = {}
    for entry in manifest.tensors:
        blob = manifest.blobs[entry.blob]
        known = stored[blob.digest]
        same = _is_whole(entry, blob.nbytes) and (DTYPES[entry.dtype], entry.shape) == (known.dtype, known.shape)
        if same and entry.path != known.name:
            found[entry.path] = known.name
    return found
