"""The scratch memory that vLLM's layers share within a step, moved into ranges that can leave.

Nothing of it is needed from one step to the next, so that it is not copied. vLLM replaces a workspace when it needs a
larger one; the range of the old one is freed then, and the new one stays on the device in a swap. Memory that vLLM
keeps beside the workspaces, by a key, is left alone.

Relies on ``vllm.v1.worker.workspace``, and on being called before CUDA graphs are captured, which have addresses.
"""

from __future__ import annotations

from typing import Final

import torch

from shared_store.base.errors import ConfigError
from shared_store.private.ranges import PrivateMemory
from shared_store.torch.views import bytes_in, storage_of
from wooly_vllm import compat

LEAST_BYTES: Final = 8 << 20
"""Smaller workspaces stay where they are: a range has whole granules."""

_FROM_COUNTING: Final = 1
"""References to a storage that counting its references adds."""


def move_in(memory: PrivateMemory) -> int:
    """Move this process's workspaces into ranges. Returns their bytes.

    A workspace stays if anything else has a view of it.

    Raises:
        OutOfMemoryError: the device has no memory for a second copy, which exists for a moment.
    """
    moved = 0
    for workspace in _workspaces():
        used = torch._C._storage_Use_Count(workspace.untyped_storage()._cdata)
        if workspace.nbytes < LEAST_BYTES or used > 1 + _FROM_COUNTING:
            continue
        target = bytes_in(storage_of(memory.allocate(workspace.nbytes)))
        workspace.data = target[: workspace.nbytes].view(workspace.dtype).view(workspace.shape)
        moved += workspace.nbytes
    return moved


def _workspaces() -> list[torch.Tensor]:
    """Return the workspaces of this process; none in a vLLM that has no such manager.

    None either where a program may make several engines in its process: they share workspaces, and leave one by one.
    """
    if not compat.one_engine_a_process():
        return []
    try:
        exists, current = compat.find(
            "vllm.v1.worker.workspace", "is_workspace_manager_initialized", "current_workspace_manager"
        )
    except ConfigError:
        return []
    if not exists():
        return []
    found = getattr(current(), "_current_workspaces", [])
    return [workspace for workspace in found if isinstance(workspace, torch.Tensor)]
