"""The settings of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shared_store.base import envs


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
        )
