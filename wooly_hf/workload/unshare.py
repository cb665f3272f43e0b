"""Make a model private as its user asks, and tell the workload."""

from __future__ import annotations

import contextlib

from torch import nn

from wooly_hf import sharing
from wooly_hf.workload import process


def unshare(module: nn.Module) -> int:
    """Move a model, or a part of one, to private memory, so that it can be written to.

    Tensor objects stay the same, so tied tensors stay tied and references stay valid. Views that the module does not
    reach keep the shared memory. The rest of it is unmapped once this process's work on the device has ended: on a GPU
    the copies themselves may be in flight. A model that was swapped out returns first.

    Returns:
        The bytes that became private.
    """
    workload = process.current()
    with contextlib.nullcontext() if workload is None else workload.gate.using():
        nbytes = sharing.unshare(module)
    if workload is not None:
        for model in workload.models():
            workload.measure(model)
    return nbytes
