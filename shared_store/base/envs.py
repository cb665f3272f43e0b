"""The environment variables of wooly: a registry of all of them.

A test compares ``docs/environment.md`` with it. Values are read on every access, never at import, so that they may be
set after wooly was imported. A variable that the environment does not have is looked up in the configuration files
(:mod:`~shared_store.base.config_file`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from shared_store.base import config_file
from shared_store.base.durations import parse_duration
from shared_store.base.errors import ConfigError
from shared_store.base.sizes import parse_size

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One variable: its name, meaning and default, and the parser of its text.

    Attributes:
        aliases: other names, which count where the name is not set.
        in_files: whether configuration files may set it.
    """

    name: str
    meaning: str
    default: str
    parse: Callable[[str], T]
    aliases: tuple[str, ...] = ()
    in_files: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The name, and the aliases in order of precedence."""
        return self.name, *self.aliases

    def get(self) -> T:
        """Return the current value: the environment's, a configuration file's, or the default.

        Raises:
            ConfigError: the text is invalid. The message names the variable, the file if one set it, and the valid
                values.
        """
        name, text, file = self.given() or (self.name, self.default, None)
        try:
            return self.parse(text)
        except ValueError as error:
            place = "" if file is None else f" in {file}"
            raise ConfigError(f"{name}={text!r}{place}: {error}") from error

    def given(self) -> tuple[str, str, Path | None] | None:
        """Return the name, text and configuration file (None: the environment) of the value, or None if it is unset.

        Raises:
            ConfigError: a configuration file cannot be read.
        """
        for name in self.names:
            if os.environ.get(name):
                return name, os.environ[name], None
        return config_file.lookup(self.names) if self.in_files else None


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
    raise ValueError("use 1 or 0, or true or false")


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


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%"))
    except ValueError:
        share = -1.0
    if not (share == 0 or 1 <= share <= 100):
        raise ValueError("use a percentage from 1 to 100, or 0 for an equal part")
    return share


def _percent(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 100):
        raise ValueError("use a whole percentage from 1 to 100")
    return int(text)


def _exclusive(text: str) -> bool:
    if text.lower() not in {"exclusive", "shared"}:
        raise ValueError("use Shared or Exclusive")
    return text.lower() == "exclusive"


def _uids(text: str) -> tuple[int, ...]:
    numbers = [number.strip() for number in text.split(",") if number.strip()]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError("use user ids separated by commas, such as 1000,1001")
    return tuple(int(number) for number in numbers)


def _optional_path(text: str) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


def _directories(text: str) -> tuple[Path, ...]:
    return tuple(Path(part).expanduser().resolve() for part in text.split(os.pathsep) if part)


def _size(text: str) -> int:
    nbytes = parse_size(text)
    if nbytes is None:
        raise ValueError("use a size such as 200GiB")
    return nbytes


def _amount(text: str) -> int:
    nbytes = 0 if text.strip() == "0" else parse_size(text)
    if nbytes is None:
        raise ValueError("use a size such as 2GiB, or 0")
    return nbytes


def _optional_amount(text: str) -> int | None:
    return _amount(text) if text else None


def _duration(text: str) -> float:
    seconds = parse_duration(text)
    if seconds is None:
        raise ValueError("use a duration such as 300s, 30m or 2h")
    return seconds


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
    _optional_path,
)
CACHE_MAX_BYTES: Variable[int] = Variable(
    "WOOLY_CACHE_MAX_BYTES",
    "Limit of the saved models in `WOOLY_CACHE_DIR`, such as `200GiB`. The least recently used models are removed "
    "first.",
    "100GiB",
    _size,
)
CLIENT_CONFIG: Variable[Path | None] = Variable(
    config_file.CLIENT_CONFIG,
    "File of `KEY=VALUE` lines with variables of this table. It has precedence over `~/.config/wooly/config`.",
    "",
    _optional_path,
    in_files=False,
)
WORKLOAD: Variable[str] = Variable(
    "WOOLY_WORKLOAD",
    "Name of the workload that this process belongs to. The store makes it unique on the node with a suffix. Unset: "
    "the name of the model or command.",
    "",
    str,
)
PRIORITY: Variable[int] = Variable(
    "WOOLY_PRIORITY",
    "Priority of this process's workload, from 0 (highest) to 4. `WOOLYAI_PRIO` and `PRIO` are read where it is unset.",
    "0",
    _priority,
    aliases=("WOOLYAI_PRIO", "PRIO"),
)
SWAP_FROM_VRAM: Variable[bool] = Variable(
    "WOOLYAI_SWAP_FROM_VRAM",
    "1 or true: this process's workload may be swapped out for others. 0 or false: never.",
    "1",
    _flag,
)
COMPUTE_SHARE: Variable[float] = Variable(
    "WOOLY_COMPUTE_SHARE",
    "Share of this process's workload in its devices' time, among workloads of its priority: a percentage from 1 to "
    "100. 0: an equal part of what the others leave. What one does not use, the others get.",
    "0",
    _share,
)
GPU_MODE: Variable[bool] = Variable(
    "GPU_MODE",
    "`Exclusive`: no other workload may use the devices of this process's workload. `Shared`: others may.",
    "Shared",
    _exclusive,
)
MPS_PERCENT: Variable[int | None] = Variable(
    "WOOLY_MPS_PERCENT",
    "Cap of this process's workload under NVIDIA MPS: percentage of a GPU's threads that it may use, from 1 to 100. "
    "Needs a running MPS control daemon. Under MPS the fault of one process kills its neighbours. Unset: no cap.",
    "",
    _percent,
)
MEMBER_OF: Variable[str] = Variable(
    "WOOLY_MEMBER_OF",
    "Id of the workload that this worker process belongs to. Set by wooly for the processes of an engine; not for "
    "users.",
    "",
    str,
    in_files=False,
)
VRAM_RESERVE: Variable[int | None] = Variable(
    "WOOLY_VRAM_RESERVE",
    "Memory that stays free on each device, such as `2GiB`. Unset: `2GiB` on a GPU, `256MiB` on `cpu`.",
    "",
    _optional_amount,
)
IDLE_AFTER: Variable[float] = Variable(
    "WOOLY_IDLE_AFTER",
    "Time without work after which a workload may be swapped out to restore the reserve. For a workload that waits, "
    "see `WOOLY_MIN_RESIDENT`.",
    "300s",
    _duration,
)
MIN_RESIDENT: Variable[float] = Variable(
    "WOOLY_MIN_RESIDENT",
    "Time for which an idle workload stays after it returned, while others of its priority or a lower one wait; never "
    "less than four times the measured cost of its swap. A P0 workload that waits does not wait for it.",
    "2s",
    _duration,
)
TURN: Variable[float] = Variable(
    "WOOLY_TURN",
    "Time for which a busy workload stays after it returned, while others of its priority wait; never less than "
    "ten times the measured cost of its swap.",
    "5s",
    _duration,
)
DEEP_AFTER: Variable[float] = Variable(
    "WOOLY_DEEP_AFTER",
    "Time without work after which the driver takes a swapped workload off its GPU (`checkpointed`); 0: never.",
    "30m",
    _duration,
)
ARBITER: Variable[bool] = Variable(
    "WOOLY_ARBITER",
    "1 or true: workloads of one device compute by priority and share. 0 or false: as the driver lets them.",
    "1",
    _flag,
)
MAX_HOLD: Variable[float] = Variable(
    "WOOLY_MAX_HOLD",
    "Time after which a workload that is held for a more important one makes one step all the same; 0: it makes none.",
    "0",
    _duration,
)
HOST_BUDGET: Variable[int | None] = Variable(
    "WOOLY_HOST_BUDGET",
    "Host memory for copies of swapped workloads and shared weights, such as `64GiB`. Unset: half of the host memory "
    "that is free when the store starts.",
    "",
    _optional_amount,
)
SWAP_DIR: Variable[Path | None] = Variable(
    "WOOLY_SWAP_DIR",
    "Directory for copies that do not lie in host memory: all of swapped workloads on `cpu`, and some of others when "
    "the host budget is used. Unset: `/var/tmp`, unless that is on tmpfs.",
    "",
    _optional_path,
)
LOCK_DIR: Variable[Path] = Variable(
    "WOOLY_LOCK_DIR",
    "Directory of the locks that let one store of a node grant a GPU's memory. All users and containers that share a "
    "GPU must see the same directory.",
    "/dev/shm",  # noqa: S108 - files there are opened without following links, and only locked
    lambda text: Path(text).expanduser().absolute(),
)
START_TIMEOUT: Variable[float] = Variable(
    "WOOLY_START_TIMEOUT",
    "Longest time for which a start waits for memory. The limit of vLLM itself is 600 seconds.",
    "540s",
    _duration,
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
    CLIENT_CONFIG,
    WORKLOAD,
    PRIORITY,
    SWAP_FROM_VRAM,
    COMPUTE_SHARE,
    GPU_MODE,
    MPS_PERCENT,
    MEMBER_OF,
    VRAM_RESERVE,
    IDLE_AFTER,
    MIN_RESIDENT,
    TURN,
    DEEP_AFTER,
    ARBITER,
    MAX_HOLD,
    HOST_BUDGET,
    SWAP_DIR,
    LOCK_DIR,
    START_TIMEOUT,
    POD_NAMESPACE,
    POD_NAME,
    CONTAINER_NAME,
    ADMIN_UIDS,
    ADMIN_GROUP,
)
