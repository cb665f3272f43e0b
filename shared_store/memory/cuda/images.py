"""Images of the digest kernels, which ``deploy/kernels.py`` compiles: stored in one file, and chosen for a GPU.

Needs no driver.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from shared_store.base.digest import digest
from shared_store.base.errors import MemoryBackendError

THREADS: Final = 256
"""Threads of a thread block, which ``blake3.cu`` is compiled for."""

ENTRIES: Final = (b"hash_groups", b"join_groups")
"""Names of the kernels."""

TARGETS: Final = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_75")
"""Architectures that are compiled ahead: machine code (``sm_``), and PTX (``compute_``) for later GPUs."""

OPTIONS: Final = ("--std=c++17", f"-DTHREADS={THREADS}")
"""Options of the compiler, besides the target."""


class Images(msgspec.Struct, frozen=True):
    """The content of a file of images.

    Attributes:
        source: see :func:`fingerprint`.
        compiler: NVRTC's version.
        images: compressed images by target.
    """

    source: bytes
    compiler: str
    images: dict[str, bytes]

    def image(self, target: str) -> bytes:
        """Return the machine code or PTX of a target."""
        return zlib.decompress(self.images[target])


def fingerprint(source: bytes) -> bytes:
    """Return a digest of a source and of the options that it is compiled with."""
    return digest(source + b"\0" + " ".join((*OPTIONS, *TARGETS)).encode())


def read(file: Path) -> Images:
    """Read a file of images.

    Raises:
        MemoryBackendError: it cannot be read.
    """
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=Images)
    except (OSError, msgspec.MsgspecError) as error:
        raise MemoryBackendError(f"cannot read the digest kernels in {file}: {error}; install wooly again") from error


def suitable(targets: Iterable[str], capability: tuple[int, int]) -> list[str]:
    """Return the targets that run on a GPU, best first.

    Machine code runs on GPUs of the same major compute capability and at least its minor one, PTX on all later GPUs:
    https://docs.nvidia.com/cuda/cuda-compiler-driver-nvcc/index.html#gpu-compilation.

    Args:
        targets: to choose from.
        capability: the GPU's compute capability, major and minor.
    """
    found = []
    for target in targets:
        kind, _, number = target.partition("_")
        major, minor = divmod(int(number), 10)
        code = kind == "sm"
        if (major, minor) <= capability and (not code or major == capability[0]):
            found.append((code, major, minor, target))
    return [target for *_, target in sorted(found, reverse=True)]
