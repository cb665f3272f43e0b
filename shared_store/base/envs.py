"""The environment variables of wooly: a registry of all of them.

A test compares ``docs/environment.md`` with it. Values are read on every access, never at import, so that they may be
set after wooly was imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from shared_store.base.errors import ConfigError
from shared_store.base.sizes import parse_size

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One variable: its name, meaning and default, and the parser of its text."""

    name: str
    meaning: str
    default: str
    parse: Callable[[str], T]

    def get(self) -> T:
        """Return the current value. Raises :class:`ConfigError`, which names the variable, for an invalid text."""
        text = os.environ.get(self.name)
        if text is None or text == "":
            text = self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"{self.name}={text!r}: {error}") from error


def _runtime_dir(text: str) -> Path:
    if text:
        return Path(text).expanduser()
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "wooly" if base else Path(f"/tmp/wooly-{os.getuid()}")  # noqa: S108 - checked by paths.py


def _flag(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError("use 1 or 0")


def _log_level(text: str) -> str:
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    if text.upper() not in levels:
        raise ValueError(f"use one of {', '.join(levels)}")
    return text.upper()


def _optional(text: str) -> str | None:
    return text or None


def _priority(text: str) -> int:
    digit = text.upper().removeprefix("P")
    if digit not in {"0", "1", "2", "3", "4"}:
        raise ValueError("use 0 (highest) to 4")
    return int(digit)


def _uids(text: str) -> tuple[int, ...]:
    numbers = [number.strip() for number in text.split(",") if number.strip()]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError("use user ids separated by commas, such as 1000,1001")
    return tuple(int(number) for number in numbers)


def _optional_directory(text: str) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


def _directories(text: str) -> tuple[Path, ...]:
    return tuple(Path(part).expanduser().resolve() for part in text.split(os.pathsep) if part)


def _size(text: str) -> int:
    nbytes = parse_size(text)
    if nbytes is None:
        raise ValueError("use a size such as 200GiB")
    return nbytes


def _when_to_verify(text: str) -> bool:
    if text not in {"never", "attach"}:
        raise ValueError("use never or attach")
    return text == "attach"


RUNTIME_DIR: Variable[Path] = Variable(
    "WOOLY_RUNTIME_DIR",
    "Directory of the store's socket, lock and log; mode 0700. Unset: `$XDG_RUNTIME_DIR/wooly`, "
    "or `/tmp/wooly-UID` without `XDG_RUNTIME_DIR`.",
    "",
    _runtime_dir,
)
REDIS_URL: Variable[str | None] = Variable(
    "WOOLY_REDIS_URL",
    "URL of the catalog's Redis or Valkey server, such as `redis://host:6379/0` or `unix:///path`. "
    "Unset: the store starts a server of its own on a private socket.",
    "",
    _optional,
)
AUTOSTART: Variable[bool] = Variable(
    "WOOLY_AUTOSTART", "1: a client that finds no store starts one. 0: it fails.", "1", _flag
)
LOG_LEVEL: Variable[str] = Variable(
    "WOOLY_LOG_LEVEL",
    "Log level of the store and the `wooly` command: `DEBUG`, `INFO`, `WARNING` or `ERROR`.",
    "INFO",
    _log_level,
)
CPU_DISPATCH: Variable[bool] = Variable(
    "WOOLY_CPU_DISPATCH",
    "1: every vLLM engine on a CPU uses the linear kernels that wooly uses, with any load format. "
    "Use it to compare tokens and speed with stock vLLM under equal kernels.",
    "0",
    _flag,
)
WEIGHTS_DEDUP: Variable[bool] = Variable(
    "WOOLYAI_WEIGHTS_DEDUP",
    "1: processes share weights without a change of their command line or code: vLLM with the load format `auto`, and "
    "transformers' `from_pretrained` onto one device, if `wooly_hf` is imported or `wooly[activate]` is installed.",
    "0",
    _flag,
)
STRICT: Variable[bool] = Variable(
    "WOOLY_STRICT",
    "1: it is an error if a transformers model cannot be shared. 0: the model is loaded the stock way, with a warning "
    "that names the reason, and counted as a fallback.",
    "0",
    _flag,
)

VERIFY: Variable[bool] = Variable(
    "WOOLY_VERIFY",
    "`attach`: engines verify shared weights before they use them. Weights that do not match their digests are "
    "quarantined, and the engine loads the model the stock way. `never`: engines rely on the verification at "
    "publication.",
    "never",
    _when_to_verify,
)
CACHE_DIR: Variable[Path | None] = Variable(
    "WOOLY_CACHE_DIR",
    "Directory of the cache. Published models are saved there in the background, and restored from there instead of "
    "from a checkpoint. Unset: no cache.",
    "",
    _optional_directory,
)
CACHE_MAX_BYTES: Variable[int] = Variable(
    "WOOLY_CACHE_MAX_BYTES",
    "Limit of the saved models in `WOOLY_CACHE_DIR`, such as `200GiB`. The least recently used models are removed "
    "first.",
    "100GiB",
    _size,
)
WORKLOAD: Variable[str] = Variable(
    "WOOLY_WORKLOAD",
    "Name of the workload that this process belongs to, for the status. Unset: the name of the model or command.",
    "",
    str,
)
PRIORITY: Variable[int] = Variable(
    "WOOLYAI_PRIO", "Priority of this process's workload, from 0 (highest) to 4.", "0", _priority
)
SWAP_FROM_VRAM: Variable[bool] = Variable(
    "WOOLYAI_SWAP_FROM_VRAM",
    "1: memory of this process may be swapped out for other workloads. 0: never.",
    "1",
    _flag,
)
POD_NAMESPACE: Variable[str] = Variable(
    "WOOLY_POD_NAMESPACE",
    "Namespace of this process's pod, for the status; from the downward API (`metadata.namespace`).",
    "",
    str,
)
POD_NAME: Variable[str] = Variable(
    "WOOLY_POD_NAME", "Name of this process's pod; from the downward API (`metadata.name`).", "", str
)
CONTAINER_NAME: Variable[str] = Variable("WOOLY_CONTAINER_NAME", "Name of this process's container.", "", str)
ADMIN_UIDS: Variable[tuple[int, ...]] = Variable(
    "WOOLY_ADMIN_UIDS",
    "User ids, separated by commas, that may administer the store, besides its own and root's.",
    "",
    _uids,
)
ADMIN_GROUP: Variable[str | None] = Variable(
    "WOOLY_ADMIN_GROUP", "Group (name or number) whose members may administer the store.", "", _optional
)

TRUSTED_DIRECTORIES: Variable[tuple[Path, ...]] = Variable(
    "WOOLY_TRUSTED_DIRECTORIES",
    "Directories, separated by `:`, in which a change of a file is sure to change its inode, size or ctime, although "
    "the file system is of a kind that may make these up (FUSE, 9p, CIFS and others): wooly hashes checkpoints there "
    "once, not at every load.",
    "",
    _directories,
)
REGISTRY: tuple[Variable[object], ...] = (  # type: ignore[assignment]  # Variable is covariant in all but name
    RUNTIME_DIR,
    REDIS_URL,
    AUTOSTART,
    LOG_LEVEL,
    CPU_DISPATCH,
    WEIGHTS_DEDUP,
    STRICT,
    VERIFY,
    CACHE_DIR,
    CACHE_MAX_BYTES,
    TRUSTED_DIRECTORIES,
    WORKLOAD,
    PRIORITY,
    SWAP_FROM_VRAM,
    POD_NAMESPACE,
    POD_NAME,
    CONTAINER_NAME,
    ADMIN_UIDS,
    ADMIN_GROUP,
)
