"""How a model's blobs are laid out in safetensors files: a pure function.

The format is that of https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, then the
tensors' bytes without gaps. Each distinct blob is stored once. Where a tensor is all of its blob and contiguous, it is
stored as that tensor, so that any reader of safetensors finds it by its name; other blobs are plain bytes, named after
a tensor that lies in them. Other names of the same bytes are in the header's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shared_store.base.manifest import ITEM_SIZES, Manifest, TensorEntry

SHARD_BYTES: Final = 4 << 30
"""Bytes after which another file begins."""

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
"""Those that every reader of safetensors knows: one that does not, refuses the whole file. Others are plain bytes."""

_HEADER_MULTIPLE: Final = 8


@dataclass(frozen=True)
class Shard:
    """One file. ``header``: what it begins with; ``offsets``: first byte in the file of each blob, by digest."""

    name: str
    header: bytes
    offsets: dict[bytes, int]
    nbytes: int


@dataclass(frozen=True)
class _Stored:
    """A blob as it appears in a file."""

    digest: bytes
    nbytes: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    alignment: int


def shards(manifest: Manifest, target: int = SHARD_BYTES) -> list[Shard]:
    """Lay a model out, in the order of its manifest, in files of about ``target`` bytes."""
    groups: list[list[_Stored]] = [[]]
    for stored in _stored(manifest):
        if groups[-1] and sum(one.nbytes for one in groups[-1]) + stored.nbytes > target:
            groups.append([])
        groups[-1].append(stored)
    aliases = _aliases(manifest, {one.digest: one for group in groups for one in group})
    made = []
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Readers make tensors of the bytes where they lie, so the larger elements come first.
        made.append(_shard(name, sorted(group, key=lambda one: -one.alignment), aliases))
    return made


def index(made: list[Shard]) -> bytes:
    """The file that tells which tensor is in which shard, as transformers reads it."""
    weight_map = {name: shard.name for shard in made for name in _names(shard)}
    total = sum(shard.nbytes - len(shard.header) for shard in made)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()


def _shard(name: str, group: list[_Stored], aliases: Mapping[str, str]) -> Shard:
    here = {one.name for one in group}
    metadata = {"format": "pt", "wooly.aliases": json.dumps({a: b for a, b in aliases.items() if b in here})}
    header: dict[str, Any] = {"__metadata__": metadata}
    starts: dict[bytes, int] = {}
    end = 0
    for one in group:
        starts[one.digest] = end
        header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": (end, end + one.nbytes)}
        end += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_MULTIPLE)
    begin = len(text).to_bytes(8, "little") + text
    return Shard(name, begin, {digest: len(begin) + at for digest, at in starts.items()}, len(begin) + end)


def _names(shard: Shard) -> Iterator[str]:
    return (name for name in json.loads(shard.header[8:]) if name != "__metadata__")


def _stored(manifest: Manifest) -> Iterator[_Stored]:
    """Each distinct blob once."""
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
        if name in taken:  # of a module with a dot in its name, say
            name = f"{name}#{digest.hex()}"
        taken.add(name)
        yield _Stored(digest, nbytes, name, dtype, shape, alignment)


def _is_whole(entry: TensorEntry, nbytes: int) -> bool:
    """Whether a tensor is all of its blob, contiguous, and of a dtype that safetensors has."""
    elements = 1
    for size, step in zip(reversed(entry.shape), reversed(entry.stride), strict=True):
        if size != 1 and step != elements and 0 not in entry.shape:
            return False
        elements *= size
    return entry.dtype in DTYPES and not entry.offset and elements * ITEM_SIZES[entry.dtype] == nbytes


def _aliases(manifest: Manifest, stored: Mapping[bytes, _Stored]) -> dict[str, str]:
    """Other names of stored tensors that are the same tensor: same bytes, dtype and shape."""
    found: dict[str, str] = {}
    for entry in manifest.tensors:
        blob = manifest.blobs[entry.blob]
        one = stored[blob.digest]
        same = _is_whole(entry, blob.nbytes) and (DTYPES[entry.dtype], entry.shape) == (one.dtype, one.shape)
        if same and entry.path != one.name:
            found[entry.path] = one.name
    return found
