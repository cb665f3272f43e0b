"""The keys of ``--model-loader-extra-config`` for the load format ``wooly``."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from shared_store.base.errors import ConfigError
from shared_store.torch.load import SHARE_MIN_BYTES, TIMEOUT_S

CHECKPOINT_FORMATS = ("auto", "hf", "safetensors", "pt", "npcache", "mistral", "fastsafetensors")
"""Load formats whose weights come from files that can be hashed, and nowhere else."""


@dataclass(frozen=True)
class Options:
    """How to load.

    Attributes:
        mode: ``auto``: attach, or publish where nobody has; ``save``: the same, but a model that could not be
            published is an error (what is in the store is never replaced); ``load``: attach or fail.
        inner_load_format: what reads the checkpoint when it has to be read.
        fallback: whether a model that cannot be shared is loaded the stock way, with a warning, instead of failing.
        restore_from: a directory that ``wooly save`` wrote: a model that the store does not have is restored from it.
            One that cannot be is loaded, or, with ``mode`` ``load``, an error.
        runtime_dir: the store's directory, instead of what ``WOOLY_RUNTIME_DIR`` says.
        timeout_s: how long to wait for another process that loads the same model, in seconds.
        share_min_bytes: tensors below this size are copied into the process: engines write to small ones.
        unproven: also share models whose layers have methods that no comparison with stock vLLM has passed with; for
            making that comparison.
    """

    mode: Literal["auto", "save", "load"] = "auto"
    inner_load_format: str = "auto"
    fallback: bool = True
    restore_from: Path | None = None
    runtime_dir: Path | None = None
    timeout_s: float = TIMEOUT_S
    share_min_bytes: int = SHARE_MIN_BYTES
    unproven: bool = False

    @property
    def falls_back(self) -> bool:
        """Whether the stock way is a way out."""
        return self.fallback and self.mode == "auto"


def parse(extra: Mapping[str, Any] | str | None) -> Options:
    """Read the extra config.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong kind; the message lists what is valid.
    """
    given: Any = extra or {}
    valid = ", ".join(Options.__dataclass_fields__)
    if not isinstance(given, Mapping):
        raise ConfigError(f"--model-loader-extra-config for load format wooly is a JSON object with keys: {valid}")
    unknown = sorted(set(given) - set(Options.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"unknown key {', '.join(unknown)} in --model-loader-extra-config; valid keys: {valid}")
    try:
        options = msgspec.convert(dict(given), Options, dec_hook=_path)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--model-loader-extra-config: {error}; valid keys: {valid}") from error
    if options.inner_load_format not in CHECKPOINT_FORMATS:
        raise ConfigError(
            f"inner_load_format {options.inner_load_format!r} does not read a checkpoint's files; "
            f"use one of {', '.join(CHECKPOINT_FORMATS)}"
        )
    if not 0 < options.timeout_s <= threading.TIMEOUT_MAX or options.share_min_bytes < 1:
        raise ConfigError(
            f"timeout_s is more than 0 and at most {threading.TIMEOUT_MAX:.0f}, share_min_bytes is at least 1; "
            f"not {options.timeout_s} and {options.share_min_bytes}"
        )
    return options


def split(extra: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Read an extra config that may be for another loader too; the second result is what is not for us.

    Raises:
        ConfigError: a value of one of our keys is of the wrong kind.
    """
    ours = {key: value for key, value in extra.items() if key in Options.__dataclass_fields__}
    return parse(ours), {key: value for key, value in extra.items() if key not in ours}


def _path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    raise ValueError(f"{value!r} is no {kind.__name__}")
