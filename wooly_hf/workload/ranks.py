"""Why a process is never held for others: ranks of one job wait for each other, and so for all that one waits for.

Two jobs whose ranks took turns in opposite order would wait for each other. In doubt a process counts as a rank: its
steps are free, and count for other workloads all the same.

Relies on the variables that launchers set (``torchrun``, ``accelerate launch``, MPI), and on torch's default group.
"""

from __future__ import annotations

import os
from typing import Final

import torch

SIZES: Final = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers tell the number of ranks; accelerate reads the same."""


def reason() -> str:
    """Return the reason in the environment or in torch's process group; empty if this process is alone."""
    for name in SIZES:
        size = os.environ.get(name, "")
        if size.isascii() and size.isdigit() and int(size) > 1:
            return f"it was started as one of {int(size)} ranks ({name}), which wait for each other"
    return group()


def group() -> str:
    """Return the reason in torch's process group, which may be made at any time; empty if there is none."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return f"it is one of {distributed.get_world_size()} ranks of torch.distributed, which wait for each other"
    return ""
