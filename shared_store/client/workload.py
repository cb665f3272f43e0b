"""This process's description of itself for the store, from environment variables.

In a Kubernetes pod the variables come from the downward API. Nothing is guessed: a variable that is not set is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared_store.base import envs
from shared_store.protocol.messages.identity import Identity


def describe(
    kind: str = "other",
    gpus: Sequence[str] = (),
    *,
    name: str = "",
    priority: int | None = None,
    swap: bool | None = None,
    member_of: str = "",
) -> Identity:
    """Describe this process.

    Args:
        kind: one of :data:`~shared_store.protocol.messages.identity.KINDS`.
        gpus: the store's names of the devices that it uses; those that are no GPUs are left out.
        name: of the workload; empty: from the environment.
        priority: 0 (highest) to 4; None: from the environment.
        swap: whether its memory may be swapped out; None: from the environment.
        member_of: the workload that this process belongs to; empty: from the environment.

    Raises:
        ConfigError: a variable has an invalid value.
    """
    return Identity(
        name or envs.WORKLOAD.get(),
        kind,
        envs.PRIORITY.get() if priority is None else priority,
        envs.SWAP_FROM_VRAM.get() if swap is None else swap,
        tuple(gpus),
        envs.POD_NAMESPACE.get(),
        envs.POD_NAME.get(),
        envs.CONTAINER_NAME.get(),
        member_of or envs.MEMBER_OF.get(),
    ).cleaned()
