"""A saved model made of a checkpoint's safetensors files as they are, without an engine, for the benchmark ``disk``."""

from __future__ import annotations

import json
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import shared_store
from benchmarks.harness.figures import MIB
from shared_store.base import manifest as manifests
from shared_store.base.digest import digest
from shared_store.base.manifest import Blob, Manifest, TensorEntry
from shared_store.disk.description import DESCRIPTION, Description, SavedBlob, SavedFile, encode
from shared_store.transfer.copier import threads

_SIZES = (4 * MIB, 2 * MIB, 2 * MIB, 4 * MIB, 16 * MIB, 16 * MIB, 16 * MIB, 8192)
"""Bytes of a layer's tensors: matrices of 2 to 16 MiB, and a norm."""


def random_checkpoint(directory: Path, nbytes: int) -> None:
    """Write a safetensors file of random bytes in the sizes of a small Llama, with at least ``nbytes`` of tensors."""
    header: dict[str, Any] = {}
    end = 0
    while end < nbytes:
        layer, part = divmod(len(header), len(_SIZES))
        size = _SIZES[part]
        header[f"layers.{layer}.{part}.weight"] = {
            "dtype": "BF16",
            "shape": [size // 2],
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            first, last = entry["data_offsets"]
            file.write(os.urandom(last - first))


def describe(directory: Path, key: str, device: str) -> int:
    """Turn the checkpoint files in a directory into a saved model; return the bytes of its tensors.

    Reads all files, which are then in the page cache. Exits with a message if two tensors are equal.
    """
    files: list[SavedFile] = []
    places: dict[bytes, SavedBlob] = {}
    blobs: list[Blob] = []
    names: list[str] = []
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:begin])
            header.pop("__metadata__", None)
            files.append(SavedFile(path.name, len(content), begin, digest(content[:begin]).hex()))
            spans = [(begin + entry["data_offsets"][0], begin + entry["data_offsets"][1]) for entry in header.values()]
            with ThreadPoolExecutor(threads()) as pool, memoryview(content) as view:
                found = list(pool.map(lambda span: _digest(view, *span), spans))
        for name, (first, last), one in zip(header, spans, found, strict=True):
            if one in places:
                raise SystemExit(f"{name} equals another tensor; the benchmark needs distinct ones")
            places[one] = SavedBlob(one.hex(), last - first, number, first)
            blobs.append(Blob(one, last - first))
            names.append(name)
    tensors = tuple(
        TensorEntry("", name, "parameter", index, "uint8", (blob.nbytes,), (1,), 0, index)
        for index, (name, blob) in enumerate(zip(names, blobs, strict=True))
    )
    manifest = Manifest(key=key, name="bench", engine="bench", device=device, blobs=tuple(blobs), tensors=tensors)
    description = Description(
        wooly=shared_store.__version__,
        saved_at=time.time(),
        key=key,
        name="bench",
        engine="bench",
        device=device,
        files=tuple(files),
        blobs=tuple(places.values()),
        manifest=manifests.encode(manifest),
    )
    (directory / DESCRIPTION).write_bytes(encode(description))
    return manifest.nbytes


def _digest(view: memoryview, first: int, last: int) -> bytes:
    with view[first:last] as part:
        return digest(part)
