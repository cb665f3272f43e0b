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

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared_store.memory.cuda import images
from shared_store.memory.cuda.kernels import IMAGES, SOURCE


def main() -> None:
    """Compile for all targets, and replace the file."""
    from cuda.bindings import nvrtc

    source = SOURCE.read_bytes()
    version = ".".join(str(number) for number in nvrtc.nvrtcVersion()[1:])
    compiled = {target: zlib.compress(images.compile_source(source, target), 9) for target in images.TARGETS}
    IMAGES.write_bytes(msgspec.msgpack.encode(images.Images(images.fingerprint(source), version, compiled)))
    print(f"{IMAGES}: {IMAGES.stat().st_size} bytes, NVRTC {version}: {', '.join(compiled)}")


if __name__ == "__main__":
    main()
