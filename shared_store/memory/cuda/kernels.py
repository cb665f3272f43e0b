"""The digest kernels of ``blake3.cu``, compiled ahead for each kind of GPU, and loaded by the driver.

``blake3.kernels`` contains machine code for each GPU architecture of :data:`~shared_store.memory.cuda.images.TARGETS`,
and PTX, which the driver compiles for later ones. ``deploy/kernels.py`` makes it. Loading machine code takes a few
milliseconds and no compiler. A GPU for which the driver accepts none of the images gets kernels that CuPy compiles on
first use, in about a second, and caches on disk. CuPy is imported only then.

Loaded kernels retain the device's primary context until the process ends: the one that an engine's torch uses.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final

from shared_store.base.errors import MemoryBackendError, OutOfMemoryError
from shared_store.memory.cuda import images
from shared_store.memory.cuda.driver import Driver

log = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).with_name("blake3.cu")
IMAGES: Final = Path(__file__).with_name("blake3.kernels")

_Module = tuple[str, Any, list[Any]]
"""Name of the image, the owner of the functions, and the functions in order of the entries."""

_loaded: dict[int, Kernels] = {}
_lock = Lock()


@dataclass(frozen=True)
class Kernels:
    """The kernels of one device, as the driver's functions, and the context that they are loaded into.

    Attributes:
        context: the device's primary context, retained.
        hash_groups: hashes each group of chunks.
        join_groups: joins the groups of each range.
        image: the image that the driver accepted, or ``cupy``.
        module: owns the functions.
    """

    context: Any
    hash_groups: Any
    join_groups: Any
    image: str
    module: Any


def kernels_of(driver: Driver, ordinal: int) -> Kernels:
    """Return the kernels of a device, by its number in this process, and load them on the first call.

    Raises:
        OutOfMemoryError: the GPU has no memory for a context.
        MemoryBackendError: there is no such device, or no image can be loaded and none can be compiled.
    """
    with _lock:
        found = _loaded.get(ordinal)
        if found is None:
            found = _loaded[ordinal] = _load(driver, ordinal)
        return found


def _load(driver: Driver, ordinal: int) -> Kernels:
    device = driver.call("cuDeviceGet", ordinal)
    attributes = driver.bindings.CUdevice_attribute
    capability = (
        int(driver.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)),
        int(driver.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)),
    )
    context = driver.call("cuDevicePrimaryCtxRetain", device)
    driver.call("cuCtxPushCurrent", context)
    try:
        name, module, (hash_groups, join_groups) = _module(driver, capability) or _compiled(driver, ordinal)
        return Kernels(context, hash_groups, join_groups, name, module)
    except BaseException:
        driver.call("cuDevicePrimaryCtxRelease", device)
        raise
    finally:
        driver.call("cuCtxPopCurrent")


def _module(driver: Driver, capability: tuple[int, int]) -> _Module | None:
    """Load the first image that the driver accepts into the current context; return None if it accepts none."""
    refused: list[str] = []
    compiled = images.read(IMAGES)
    for name in images.suitable(compiled.images, capability):
        try:
            module = driver.call("cuModuleLoadData", compiled.image(name))
        except (MemoryBackendError, OutOfMemoryError) as error:
            refused.append(f"{name}: {error}")
        else:
            return name, module, [driver.call("cuModuleGetFunction", module, entry) for entry in images.ENTRIES]
    log.warning(
        "wooly: no digest kernel was compiled ahead for this GPU (sm_%d%d%s); compiling it, which takes about a second",
        *capability,
        f"; {'; '.join(refused)}" if refused else "",
    )
    return None


def _compiled(driver: Driver, ordinal: int) -> _Module:
    """Compile the source with CuPy, for the device with this number in this process.

    Raises:
        MemoryBackendError: CuPy is not installed, or cannot compile it.
    """
    try:
        import cupy

        with cupy.cuda.Device(ordinal):
            module = cupy.RawModule(code=SOURCE.read_text("utf-8"), options=images.OPTIONS)
            functions = [module.get_function(entry.decode()).kernel.ptr for entry in images.ENTRIES]
    except Exception as error:  # importing CuPy and NVRTC fail in many ways
        raise MemoryBackendError(
            f"the digest kernel must be compiled for this GPU, and CuPy cannot ({error}): install wooly[cuda12] or "
            "wooly[cuda13], by the driver's CUDA version"
        ) from error
    return "cupy", module, [driver.bindings.CUfunction(function) for function in functions]
