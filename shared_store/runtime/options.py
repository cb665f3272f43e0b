"""What a store is started with."""

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
        redis_url: the catalog's server; None: an embedded one.
        metrics_address: ``HOST:PORT`` for metrics and health; None: off.
        max_clients: connections at a time.
        max_resident: limit in bytes by device (``cpu`` or a GPU's UUID).
        compact_share: what of a segment (0 to 1) must be unused for an idle store to pack it anew; 1: it never does.
        socket_group: name of a group whose members may connect too.
        allow_uids: uids beside the store's own whose processes may connect.
        log_level: least severe message that is logged.
        watchdog_s: seconds of silence after which the keeper kills the store and starts another; 0: never.
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

    @staticmethod
    def from_json(text: str) -> ServeOptions:
        """Options as a starter passes them on; without text, the environment's."""
        if not text:
            return ServeOptions.from_environment()
        return msgspec.json.decode(text, type=ServeOptions, dec_hook=lambda kind, value: kind(value))

    def to_json(self) -> str:
        """The form for :meth:`from_json`."""
        return msgspec.json.encode(self, enc_hook=str).decode()

    @property
    def directory_mode(self) -> int:
        """Mode of the runtime directory: its owner's alone, or to be entered by those who may connect."""
        return 0o700 | (0o050 if self.socket_group else 0) | (0o001 if self.allow_uids else 0)

    @property
    def socket_mode(self) -> int:
        """Mode of the socket. Who is let in is decided by ``SO_PEERCRED``; this only lets them ask."""
        return 0o600 | (0o060 if self.socket_group else 0) | (0o006 if self.allow_uids else 0)

    @staticmethod
    def from_environment() -> ServeOptions:
        """The defaults, with what ``WOOLY_*`` variables say."""
        return ServeOptions(
            runtime_dir=envs.RUNTIME_DIR.get(), redis_url=envs.REDIS_URL.get(), log_level=envs.LOG_LEVEL.get()
        )
