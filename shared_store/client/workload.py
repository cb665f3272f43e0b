"""This process's description of itself for the store, from environment variables.

In a Kubernetes pod the variables come from the downward API. Nothing is guessed: a variable that is not set is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared_store.base import envs
from shared_store.base.workload_settings import WorkloadSettings
from shared_store.protocol.messages.identity import Identity


def describe(
    kind: str = "other",
    gpus: Sequence[str] = (),
    given: WorkloadSettings | None = None,
    *,
    name: str = "",
    member_of: str = "",
) -> Identity:
    """Describe this process.

    Args:
        kind: one of :data:`~shared_store.protocol.messages.identity.KINDS`.
        gpus: the store's names of the devices that it uses; those that are no GPUs are left out.
        given: settings of its workload that have precedence over the environment.
        name: of its workload, where neither they nor the environment have one.
        member_of: the id of its workload; empty: from the environment.

    Raises:
        ConfigError: a variable has an invalid value.
    """
    settings = (given or WorkloadSettings()).completed()
    return Identity(
        settings.workload or name,
        kind,
        settings.priority,
        settings.swap,
        tuple(gpus),
        envs.POD_NAMESPACE.get(),
        envs.POD_NAME.get(),
        envs.CONTAINER_NAME.get(),
        member_of or envs.MEMBER_OF.get(),
        settings.compute_share,
        settings.exclusive,
    ).cleaned()
