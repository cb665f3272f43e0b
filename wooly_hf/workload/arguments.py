"""Arguments of ``from_pretrained`` about the workload, such as ``wooly_priority``."""

from __future__ import annotations

from typing import Any, Final

from shared_store.base.errors import ConfigError
from shared_store.base.workload_settings import WorkloadSettings

NAMES: Final = ("wooly_workload", "wooly_priority", "wooly_swap", "wooly_compute_share", "wooly_exclusive")
"""In the order of the fields of :class:`WorkloadSettings`."""


def take_out(arguments: dict[str, Any]) -> WorkloadSettings | None:
    """Remove the arguments from those of a call, and return their values; None if there are none.

    Raises:
        ConfigError: a value is invalid.
    """
    given = {name: arguments.pop(name) for name in NAMES if name in arguments}
    if not given:
        return None
    try:
        return WorkloadSettings(*(given.get(name) for name in NAMES))
    except ConfigError as error:
        raise ConfigError(f"from_pretrained(wooly_...): {error}") from error
