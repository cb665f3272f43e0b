"""Copies of a checkpoint that differ from it in the bytes of one tensor, and in nothing that ``stat`` shows."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any


def zero_one_norm(source: Path, target: Path) -> str:
    """Copy a checkpoint, set one norm's weight to zero in the copy, and return the name of that tensor.

    Names, shapes, file sizes and modification times are those of ``source``.

    Raises:
        ValueError: ``source`` has no norm, or its weight is already zero.
    """
    shutil.copytree(source, target)
    for file in sorted(target.glob("*.safetensors")):
        before = file.stat()
        with file.open("r+b") as stream:
            # safetensors: length of the header (u64, little-endian), the header (JSON), the bytes of the tensors.
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
            norms = sorted(name for name, entry in header.items() if _is_norm(name, entry))
            if not norms:
                continue
            start, end = header[norms[0]]["data_offsets"]
            stream.seek(8 + length + start)
            if not any(stream.read(end - start)):
                raise ValueError(f"{norms[0]} of {source} is already zero: the copy would be equal to its source")
            stream.seek(8 + length + start)
            stream.write(bytes(end - start))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        return norms[0]
    raise ValueError(f"no norm weight in the safetensors files of {source}")


def _is_norm(name: str, entry: dict[str, Any]) -> bool:
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    is_norm = "norm" in last or last.startswith("ln_")
    return name.endswith(".weight") and is_norm and len(entry["shape"]) == 1
