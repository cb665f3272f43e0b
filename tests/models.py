"""The checkpoints that tests load: one tiny random model per family, and copies with one tensor changed.

Each is a few MiB of bf16 safetensors with tensors on both sides of 16 KiB (small ones are copied into a process, large
ones are mapped). Directories are made once per cache directory and kept; see ``families.py`` and ``checkpoints.py`` in
``benchmarks``.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from typing import TYPE_CHECKING, Any

import checkpoints
from families import VOCABULARY, random_model

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FAMILIES", "VOCABULARY", "random_model", "smollm2", "zero_one_norm"]

FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3", "gemma3", "gpt2", "bloom", "mixtral")
"""Names of the random models that most tests with engines go through; ``families.py`` in ``benchmarks`` has more."""


def smollm2(cache: Path) -> Path:
    """The checkpoint directory of SmolLM2-135M-Instruct (bf16, with its tokenizer), made in ``cache`` once."""
    return checkpoints.smollm2(cache)


def zero_one_norm(source: Path, target: Path) -> str:
    """Copy a checkpoint and zero one norm's weight in the copy; returns that tensor's name.

    Names, shapes, file sizes and modification times stay as in ``source``: all that differs is the bytes of one tensor.
    """
    shutil.copytree(source, target)
    for file in sorted(target.glob("*.safetensors")):
        before = file.stat()
        with file.open("r+b") as stream:
            # A safetensors file: length of the header (u64, little-endian), the header (JSON), the tensors' bytes.
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
            norms = sorted(name for name, entry in header.items() if _is_norm(name, entry))
            if not norms:
                continue
            start, end = header[norms[0]]["data_offsets"]
            stream.seek(8 + length + start)
            if not any(stream.read(end - start)):
                raise ValueError(f"{norms[0]} of {source} is zero already: the copy would not differ")
            stream.seek(8 + length + start)
            stream.write(bytes(end - start))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        return norms[0]
    raise ValueError(f"no norm weight in the safetensors files of {source}")


def _is_norm(name: str, entry: dict[str, Any]) -> bool:
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    is_norm = "norm" in last or last.startswith("ln_")
    return name.endswith(".weight") and is_norm and len(entry["shape"]) == 1
