"""Private memory of a worker's GPU outside of ranges: the context, and what torch allocated. It stays in a swap.

On a CPU they are those that the worker counts: a process's own heap is no memory of a workload there.
"""

from __future__ import annotations

from typing import Final

import torch

CONTEXT_BYTES: Final = 720 << 20
"""Of a CUDA context with loaded kernels (620 to 640 MiB) and of cuBLAS (98 MiB): measured on an H100, driver 580."""


class Outside:
    """Bytes of one device that torch and the driver have in this process."""

    def __init__(self, device: torch.device) -> None:
        """``device``: of the worker."""
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._most = 0
        self._counted = 0

    def count(self, nbytes: int) -> None:
        """Count memory of a CPU. That of a GPU is torch's, which is asked."""
        self._counted += nbytes

    def now(self) -> int:
        """Return the bytes that are allocated or cached now."""
        if not self._on_gpu:
            return self._counted
        reserved = torch.cuda.memory_reserved(self._device)
        self._most = max(self._most, reserved)
        return CONTEXT_BYTES + reserved

    def stays(self) -> int:
        """Return the bytes that are left when torch's cache is released."""
        return CONTEXT_BYTES + torch.cuda.memory_allocated(self._device) if self._on_gpu else self._counted

    def needed(self) -> int:
        """Return the bytes with the largest cache seen: activations of a step are allocated again."""
        self.now()
        return CONTEXT_BYTES + self._most if self._on_gpu else self._counted

    def reclaim(self) -> None:
        """Return memory that torch caches to the device. Remembers how much it was."""
        if self._on_gpu:
            self.now()
            torch.cuda.empty_cache()
