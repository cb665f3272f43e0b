"""The driver's checkpoint of a process: moves everything that it has on its GPU to host memory, and back.

CUDA driver API, "CUDA Checkpointing" (https://docs.nvidia.com/cuda/cuda-driver-api/, group CHECKPOINT). Works on other
processes of the same user in the same PID namespace, and creates no context in this one. Driver behaviour relied on,
measured with driver 580:

* A locked process runs on; its calls into CUDA block. Locking waits until its work on the GPU has ended.
* A checkpoint leaves no memory of the process on the GPU, its context included. Kernels, captured graphs and addresses
  are valid after a restore.
* Private and exported VMM memory is handled, and so are reserved addresses without memory. A process that still maps
  *imported* memory is checkpointed without an error, but its restore fails and it hangs for good: imports are
  unmapped and released first.
* A restore that finds no memory may leave the process unusable: memory is reserved first.
* Peer memory (NCCL, custom all-reduce) is not restored: only processes with one GPU are checkpointed.
"""

from __future__ import annotations

import enum
from typing import Any, Final

from shared_store.base.errors import UnsupportedError
from shared_store.memory.cuda.driver import Driver

OLDEST_DRIVER: Final = 12080
"""The driver API's version from which it has these functions: 12.8."""


class ProcessState(enum.Enum):
    """``CUprocessState``."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3


class Checkpoints:
    """Checkpoints of other processes, through this process's driver.

    All methods block until the call is done, and raise ``MemoryBackendError`` with the driver's code if it fails.
    """

    def __init__(self) -> None:
        """Start the driver.

        Raises:
            UnknownDeviceError: there is no driver.
            UnsupportedError: the driver or ``cuda-bindings`` is too old.
        """
        self._driver = Driver()
        version = self._driver.call("cuDriverGetVersion")
        if version < OLDEST_DRIVER or not hasattr(self._driver.bindings, "cuCheckpointProcessLock"):
            raise UnsupportedError(
                f"this driver (CUDA {version // 1000}.{version % 1000 // 10}) or cuda-bindings cannot checkpoint "
                "processes; both need 12.8"
            )

    def state(self, pid: int) -> ProcessState:
        """Return the state of a process."""
        return ProcessState(int(self._call("cuCheckpointProcessGetState", pid)))

    def lock(self, pid: int, timeout_s: float) -> None:
        """Block the process's calls into CUDA, once its work has ended. Fails after ``timeout_s`` seconds."""
        arguments = self._driver.bindings.CUcheckpointLockArgs()
        arguments.timeoutMs = max(1, int(timeout_s * 1000))
        self._call("cuCheckpointProcessLock", pid, arguments)

    def checkpoint(self, pid: int) -> None:
        """Move a locked process to host memory."""
        self._call("cuCheckpointProcessCheckpoint", pid, None)

    def restore(self, pid: int) -> None:
        """Move a checkpointed process back to its GPU. It is locked then."""
        self._call("cuCheckpointProcessRestore", pid, None)

    def unlock(self, pid: int) -> None:
        """Let a locked process call CUDA again."""
        self._call("cuCheckpointProcessUnlock", pid, None)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._driver.call(name, *arguments)
