"""Compile the digest kernels of ``shared_store/memory/cuda/blake3.cu`` into ``blake3.kernels`` beside it.

Needs no GPU, but NVRTC, in an environment of its own: ``pip install cuda-bindings==12.9.* blake3 msgspec
nvidia-cuda-nvrtc-cu12==12.9.*``. Version 12 makes machine code that drivers for CUDA 12 and for CUDA 13 load. A test
fails while the file is not of the source.

    python deploy/kernels.py
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared_store.memory.cuda import images
from shared_store.memory.cuda.kernels import IMAGES, SOURCE


def main() -> None:
    """Compile for all targets, and replace the file."""
    from cuda.bindings import nvrtc

    source = SOURCE.read_bytes()
    version = ".".join(str(number) for number in nvrtc.nvrtcVersion()[1:])
    compiled = {target: zlib.compress(compile_source(nvrtc, source, target), 9) for target in images.TARGETS}
    IMAGES.write_bytes(msgspec.msgpack.encode(images.Images(images.fingerprint(source), version, compiled)))
    print(f"{IMAGES}: {IMAGES.stat().st_size} bytes, NVRTC {version}: {', '.join(compiled)}")


def compile_source(nvrtc: Any, source: bytes, target: str) -> bytes:
    """Compile a source for a target. Raises :class:`RuntimeError` if NVRTC refuses it."""
    program = checked(nvrtc.nvrtcCreateProgram(source, b"blake3.cu", 0, [], []))
    options = [option.encode() for option in (*images.OPTIONS, f"--gpu-architecture={target}")]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if failed:
        text = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, text))  # NVRTC writes into the buffer, here and below
        raise RuntimeError(f"cannot compile the digest kernel for {target}: {text.decode(errors='replace')}")
    image: bytes
    if target.startswith("sm_"):
        image = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, image))
    else:
        image = b" " * checked(nvrtc.nvrtcGetPTXSize(program))
        checked(nvrtc.nvrtcGetPTX(program, image))
    return image


def checked(answer: tuple[Any, ...]) -> Any:
    """Return the result of a call of NVRTC. Raises :class:`RuntimeError` for an error code."""
    failed, *results = answer
    if failed:
        raise RuntimeError(f"NVRTC: {failed.name}")
    return results[0] if results else None


if __name__ == "__main__":
    main()
