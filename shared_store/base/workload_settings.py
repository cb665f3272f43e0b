"""Settings of a workload that its engine's options give. What they leave out is the environment's."""

from __future__ import annotations

from dataclasses import dataclass

from shared_store.base import envs
from shared_store.base.errors import ConfigError


@dataclass(frozen=True)
class WorkloadSettings:
    """Settings of one workload; None: as the environment says.

    Attributes:
        workload: name, as ``WOOLY_WORKLOAD``.
        priority: 0 (highest) to 4, as ``WOOLY_PRIORITY``.
        swap: whether it may be swapped out, as ``WOOLYAI_SWAP_FROM_VRAM``.
        compute_share: percent of its devices' time among equals, as ``WOOLY_COMPUTE_SHARE``.
        exclusive: whether no other workload may use its devices, as ``GPU_MODE``.

    Raises:
        ConfigError: a value is invalid. The message lists the valid ones.
    """

    workload: str | None = None
    priority: int | None = None
    swap: bool | None = None
    compute_share: float | None = None
    exclusive: bool | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.workload is not None and not isinstance(self.workload, str):
            raise ConfigError(f"workload {self.workload!r}: use a text")
        if self.swap is not None and not isinstance(self.swap, bool):
            raise ConfigError(f"swap {self.swap!r}: use true or false")
        if self.exclusive is not None and not isinstance(self.exclusive, bool):
            raise ConfigError(f"exclusive {self.exclusive!r}: use true or false")
        if self.compute_share is not None:
            try:
                if not isinstance(self.compute_share, int | float):
                    raise ValueError("use a number")  # noqa: TRY004, TRY301 - as the check that follows
                envs.COMPUTE_SHARE.parse(str(self.compute_share))
            except ValueError as error:
                raise ConfigError(f"compute_share {self.compute_share!r}: {error}") from error
        if self.priority is not None:
            try:
                envs.PRIORITY.parse(str(self.priority))
            except ValueError as error:
                raise ConfigError(f"priority {self.priority!r}: {error}") from error

    def completed(self) -> CompleteSettings:
        """Return the settings with the environment's values for those that are None. Raises :class:`ConfigError`."""
        return CompleteSettings(
            envs.WORKLOAD.get() if self.workload is None else self.workload,
            envs.PRIORITY.get() if self.priority is None else self.priority,
            envs.SWAP_FROM_VRAM.get() if self.swap is None else self.swap,
            envs.COMPUTE_SHARE.get() if self.compute_share is None else self.compute_share,
            envs.GPU_MODE.get() if self.exclusive is None else self.exclusive,
        )


@dataclass(frozen=True)
class CompleteSettings:
    """Settings of one workload. ``workload`` is empty if it has no name of its own."""

    workload: str
    priority: int
    swap: bool
    compute_share: float
    exclusive: bool
