"""Images of the digest kernels: how they are compiled with NVRTC, stored in one file, and chosen for a GPU.

Needs no driver. NVRTC, of the package ``cuda-bindings`` and the library of CUDA's compiler, is needed only to compile.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

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


def compile_source(source: bytes, target: str) -> bytes:
    """Compile a source for a target with NVRTC.

    Raises:
        MemoryBackendError: NVRTC is not installed, or refuses the source.
    """
    try:
        from cuda.bindings import nvrtc

        return _compile(nvrtc, source, target)
    except (ImportError, RuntimeError) as error:  # the bindings raise RuntimeError without the library
        raise MemoryBackendError(
            f"the digest kernel for {target} must be compiled, and there is no NVRTC ({error}): install "
            "nvidia-cuda-nvrtc, of the version of cuda-bindings"
        ) from error


def _compile(nvrtc: Any, source: bytes, target: str) -> bytes:
    program = _checked(nvrtc.nvrtcCreateProgram(source, b"blake3.cu", 0, [], []))
    options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={target}")]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if failed:
        text = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, text))  # NVRTC writes into the buffer, here and below
        raise MemoryBackendError(f"cannot compile the digest kernel for {target}: {text.decode(errors='replace')}")
    if target.startswith("sm_"):
        image: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, image))
    else:
        image = b" " * _checked(nvrtc.nvrtcGetPTXSize(program))
        _checked(nvrtc.nvrtcGetPTX(program, image))
    return image


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return the result of a call of NVRTC. Raises :class:`MemoryBackendError` for an error code."""
    failed, *results = answer
    if failed:
        raise MemoryBackendError(f"NVRTC: {failed.name}")
    return results[0] if results else None
