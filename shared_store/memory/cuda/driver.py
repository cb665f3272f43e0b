"""The CUDA driver: started here, called here, and its errors mapped to wooly's here.

Needs ``cuda-bindings``. Driver behaviour relied on:

* ``cuInit`` may be called any number of times, from any thread. Later calls succeed.
* A child that is forked after ``cuInit`` cannot use the driver: its calls return ``CUDA_ERROR_NOT_INITIALIZED``.
  Processes that use GPU memory are spawned.
* ``cuInit``, device queries and ``cuMem*`` calls that create, export and import memory need no context. A context costs
  620 to 640 MiB of VRAM (H100, driver 580, CUDA 13.0).
* ``CUDA_VISIBLE_DEVICES`` decides which GPUs a process sees and how they are numbered. UUIDs are the same everywhere.
"""

from __future__ import annotations

from typing import Any

from shared_store.base.errors import MemoryBackendError, OutOfMemoryError, UnknownDeviceError


class Driver:
    """The driver of this process, initialised."""

    def __init__(self) -> None:
        """Start the driver.

        Raises:
            UnknownDeviceError: ``cuda-bindings`` is not installed, or there is no driver, or it does not start.
        """
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise UnknownDeviceError(
                "GPU memory needs cuda-bindings: pip install 'wooly[cuda13]' (or cuda12)"
            ) from error
        try:
            (code,) = driver.cuInit(0)
        except RuntimeError as error:  # the bindings raise this without libcuda
            raise UnknownDeviceError(f"no NVIDIA driver: {error}") from error
        if code:
            raise UnknownDeviceError(f"the NVIDIA driver does not start: {code.name}")
        self.bindings: Any = driver
        """The module ``cuda.bindings.driver``, for its types and constants."""

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver API and return its result: None if it has none, a tuple if it has several.

        Raises:
            OutOfMemoryError: the driver returned ``CUDA_ERROR_OUT_OF_MEMORY``.
            MemoryBackendError: the driver returned any other error.
        """
        error, *results = getattr(self.bindings, name)(*arguments)
        if error == self.bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError(f"{name}: out of GPU memory, or of pinned host memory; free some")
        if error:
            raise MemoryBackendError(f"{name}: {error.name}")
        if len(results) > 1:
            return tuple(results)
        return results[0] if results else None


def visible_gpus() -> dict[str, int]:
    """Return the number of every visible GPU by its UUID. Empty without a driver or without ``cuda-bindings``."""
    try:
        driver = Driver()
    except UnknownDeviceError:
        return {}
    try:
        count = driver.call("cuDeviceGetCount")
    except (MemoryBackendError, OutOfMemoryError):
        return {}
    # The second version returns the UUID of a MIG instance where that is what CUDA shows, as torch does.
    name = "cuDeviceGetUuid_v2" if hasattr(driver.bindings, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
    found: dict[str, int] = {}
    for ordinal in range(count):
        raw = bytes(driver.call(name, driver.call("cuDeviceGet", ordinal)).bytes).hex()
        found["GPU-" + "-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:]))] = ordinal
    return found
