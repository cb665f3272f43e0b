"""The settings of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from shared_store.base import envs

GPU_RESERVE_BYTES: Final = 2 << 30
CPU_RESERVE_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class ServeOptions:
    """Settings of one store.

    Attributes:
        runtime_dir: directory of its socket, lock and log.
        redis_url: URL of the catalog's server; None starts an embedded one.
        metrics_address: ``HOST:PORT`` of metrics and health; None disables them.
        max_clients: highest number of connections at a time.
        max_resident: limit in bytes by device (``cpu`` or a GPU's UUID).
        compact_share: unused fraction (0 to 1) at which an idle store compacts a segment; 1 disables.
        socket_group: name or number of a group whose members may connect too.
        allow_uids: user ids other than the store's own that may connect.
        admin_group: name or number of a group whose members may connect and administer.
        admin_uids: user ids other than the store's own and root's that may connect and administer.
        log_level: lowest severity that is logged.
        watchdog_s: seconds without a sign of life after which the keeper restarts the store; 0 disables.
        budget: bytes that all workloads may use together on a device, private and shared; default: its physical memory.
        vram_reserve: bytes that stay free on each device; None is :meth:`reserve`'s default.
        idle_after_s: seconds without work after which a workload may be swapped out for any other.
        min_resident_s: seconds for which a workload without work stays after its return.
        turn_s: seconds for which a workload with work stays after its return, while others of its priority wait.
        deep_after_s: seconds without work after which a swapped workload is checkpointed; 0: never.
        host_budget: bytes of host memory for copies of what left; None: half of what is free when the store starts.
        swap_dir: directory for copies that do not lie in host memory; None is the default of ``WOOLY_SWAP_DIR``.
        max_priority: the highest priority (the lowest number) that a user id may claim; others may claim any.
        start_timeout_s: seconds for which a start waits for memory.
        arbiter: whether workloads of one device take turns by priority and share.
        max_hold_s: seconds after which a workload that is held makes one step; 0: it makes none.
    """

    runtime_dir: Path
    redis_url: str | None = None
    metrics_address: str | None = None
    max_clients: int = 1024
    max_resident: Mapping[str, int] = field(default_factory=dict)
    compact_share: float = 0.25
    socket_group: str | None = None
    allow_uids: tuple[int, ...] = ()
    log_level: str = "INFO"
    watchdog_s: float = 30.0
    admin_group: str | None = None
    admin_uids: tuple[int, ...] = ()
    budget: Mapping[str, int] = field(default_factory=dict)
    vram_reserve: int | None = None
    idle_after_s: float = 300.0
    min_resident_s: float = 2.0
    turn_s: float = 5.0
    deep_after_s: float = 1800.0
    host_budget: int | None = None
    swap_dir: Path | None = None
    max_priority: Mapping[int, int] = field(default_factory=dict)
    start_timeout_s: float = 540.0
    arbiter: bool = True
    max_hold_s: float = 0.0

    def reserve(self, device: str) -> int:
        """Return the bytes that stay free on a device (``cpu`` or a GPU's UUID)."""
        if self.vram_reserve is not None:
            return self.vram_reserve
        return CPU_RESERVE_BYTES if device == "cpu" else GPU_RESERVE_BYTES

    @staticmethod
    def from_json(text: str) -> ServeOptions:
        """Read options from :meth:`to_json`'s form; an empty text means :meth:`from_environment`."""
        if not text:
            return ServeOptions.from_environment()
        return msgspec.json.decode(text, type=ServeOptions, dec_hook=lambda kind, value: kind(value))

    def to_json(self) -> str:
        """Return the form for :meth:`from_json`."""
        return msgspec.json.encode(self, enc_hook=str).decode()

    @property
    def directory_mode(self) -> int:
        """Mode of the runtime directory: users who may connect may enter it, nobody else."""
        return 0o700 | (0o050 if self.socket_group else 0) | (0o001 if self._others else 0)

    @property
    def socket_mode(self) -> int:
        """Mode of the socket. It only lets users connect: ``SO_PEERCRED`` decides which of them are admitted."""
        return 0o600 | (0o060 if self.socket_group else 0) | (0o006 if self._others else 0)

    @property
    def _others(self) -> bool:
        """True if users may connect who are not in the one group that a file has."""
        return bool(self.allow_uids or self.admin_uids or self.admin_group not in (None, self.socket_group))

    @staticmethod
    def from_environment() -> ServeOptions:
        """Return the defaults, changed by ``WOOLY_*`` variables."""
        return ServeOptions(
            runtime_dir=envs.RUNTIME_DIR.get(),
            redis_url=envs.REDIS_URL.get(),
            log_level=envs.LOG_LEVEL.get(),
            admin_uids=envs.ADMIN_UIDS.get(),
            admin_group=envs.ADMIN_GROUP.get(),
            vram_reserve=envs.VRAM_RESERVE.get(),
            idle_after_s=envs.IDLE_AFTER.get(),
            min_resident_s=envs.MIN_RESIDENT.get(),
            turn_s=envs.TURN.get(),
            deep_after_s=envs.DEEP_AFTER.get(),
            host_budget=envs.HOST_BUDGET.get(),
            swap_dir=envs.SWAP_DIR.get(),
            start_timeout_s=envs.START_TIMEOUT.get(),
            arbiter=envs.ARBITER.get(),
            max_hold_s=envs.MAX_HOLD.get(),
        )
