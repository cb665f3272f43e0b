"""The environment variables that wooly reads: the one registry of them.

``docs/environment.md`` is checked against this table by a test. Values are read when asked for, never at import, so
that a test or an engine may set them late.
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
    """One variable: its name, what it means, and how its text becomes a value."""

    name: str
    meaning: str
    default: str
    parse: Callable[[str], T]

    def get(self) -> T:
        """The value now. Raises :class:`ConfigError` that names the variable when the text cannot be used."""
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


def _optional_directory(text: str) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


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
    "or `/tmp/wooly-UID` where that is not set.",
    "",
    _runtime_dir,
)
REDIS_URL: Variable[str | None] = Variable(
    "WOOLY_REDIS_URL",
    "The catalog's Redis or Valkey server, such as `redis://host:6379/0` or `unix:///path`. "
    "Unset: the store runs its own on a private socket.",
    "",
    _optional,
)
AUTOSTART: Variable[bool] = Variable(
    "WOOLY_AUTOSTART", "Whether a client starts a store for its user when none runs (1 or 0).", "1", _flag
)
LOG_LEVEL: Variable[str] = Variable(
    "WOOLY_LOG_LEVEL", "Least severe message that the store and the `wooly` command log.", "INFO", _log_level
)
CPU_DISPATCH: Variable[bool] = Variable(
    "WOOLY_CPU_DISPATCH",
    "1: every vLLM engine on a CPU uses the linear kernels that wooly uses, whatever its load format. "
    "For comparing tokens and speed with stock vLLM under equal kernels.",
    "0",
    _flag,
)
WEIGHTS_DEDUP: Variable[bool] = Variable(
    "WOOLYAI_WEIGHTS_DEDUP",
    "1: weights are shared by processes whose command line or code cannot be changed. "
    "vLLM with the load format `auto`; transformers' `from_pretrained` onto one device, once `wooly_hf` is imported or "
    "`wooly[activate]` is installed.",
    "0",
    _flag,
)
STRICT: Variable[bool] = Variable(
    "WOOLY_STRICT",
    "1: a transformers model that was to be shared and cannot be is an error. 0: it is loaded the stock way, "
    "with one warning that says why, and counted.",
    "0",
    _flag,
)

VERIFY: Variable[bool] = Variable(
    "WOOLY_VERIFY",
    "`attach`: engines digest what they map before they bind it. What is not what its digest says is taken out of "
    "service, and the engine loads the model itself. `never`: they rely on the checks at publication.",
    "never",
    _when_to_verify,
)
CACHE_DIR: Variable[Path | None] = Variable(
    "WOOLY_CACHE_DIR",
    "Directory in which published models are saved, in the background, and looked for before a checkpoint is loaded. "
    "Unset: none.",
    "",
    _optional_directory,
)
CACHE_MAX_BYTES: Variable[int] = Variable(
    "WOOLY_CACHE_MAX_BYTES",
    "Most that the saved models in `WOOLY_CACHE_DIR` may take, such as `200GiB`; the least recently used leave first.",
    "100GiB",
    _size,
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
)
