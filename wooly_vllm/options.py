"""The keys of ``--model-loader-extra-config`` for the load format ``wooly``."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from shared_store.base import envs
from shared_store.base.errors import ConfigError
from shared_store.base.workload_settings import WorkloadSettings
from shared_store.torch.load import SHARE_MIN_BYTES, TIMEOUT_S

CHECKPOINT_FORMATS = ("auto", "hf", "safetensors", "pt", "npcache", "mistral", "fastsafetensors")
"""Load formats that read weights from files only, so that a digest identifies them."""


@dataclass(frozen=True)
class Options:
    """How to load.

    Attributes:
        mode: ``auto`` attaches, or publishes a model that the store does not have. ``save`` does the same, but a model
            that cannot be published is an error (a model in the store is never replaced). ``load`` attaches or fails.
        inner_load_format: load format that reads the checkpoint of a model that is not in the store.
        fallback: load a model that cannot be shared the stock way, with a warning; False makes that an error.
        restore_from: a directory of ``wooly save``, to restore a model that the store does not have. If it cannot be
            restored it is loaded, or, with ``mode`` ``load``, an error.
        runtime_dir: the store's directory; None is the default of ``WOOLY_RUNTIME_DIR``.
        timeout_s: seconds to wait for another process that loads the same model.
        share_min_bytes: smaller tensors are copied into the process, because engines write to small ones.
        swap: whether this engine may be swapped out for others; None: ``WOOLYAI_SWAP_FROM_VRAM``.
        priority: of this engine, 0 (highest) to 4; None: ``WOOLY_PRIORITY``.
        workload: name of this engine in the status; None: ``WOOLY_WORKLOAD``.
        compute_share: percent of its devices' time among engines of its priority, 1 to 100; 0: an equal part; None:
            ``WOOLY_COMPUTE_SHARE``.
        exclusive: whether no other workload may use its devices; None: ``GPU_MODE``.
        unproven: also share models with layer methods for which no comparison with stock vLLM has passed; for making
            that comparison.
    """

    mode: Literal["auto", "save", "load"] = "auto"
    inner_load_format: str = "auto"
    fallback: bool = True
    restore_from: Path | None = None
    runtime_dir: Path | None = None
    timeout_s: float = TIMEOUT_S
    share_min_bytes: int = SHARE_MIN_BYTES
    unproven: bool = False
    swap: bool | None = None
    priority: int | None = None
    workload: str | None = None
    compute_share: float | None = None
    exclusive: bool | None = None

    @property
    def falls_back(self) -> bool:
        """True if a model that cannot be shared is loaded the stock way."""
        return self.fallback and self.mode == "auto"

    @property
    def may_be_swapped(self) -> bool:
        """True if this engine may be swapped out for others."""
        return envs.SWAP_FROM_VRAM.get() if self.swap is None else self.swap

    @property
    def workload_settings(self) -> WorkloadSettings:
        """The keys that describe the workload."""
        return WorkloadSettings(self.workload, self.priority, self.swap, self.compute_share, self.exclusive)


def parse(extra: Mapping[str, Any] | str | None) -> Options:
    """Read the extra config.

    Raises:
        ConfigError: a key is unknown, or a value is invalid; the message lists the valid ones.
    """
    given: Any = extra or {}
    valid = ", ".join(Options.__dataclass_fields__)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"--model-loader-extra-config for load format wooly must be a JSON object; valid keys: {valid}"
        )
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
            f"timeout_s must be above 0 and at most {threading.TIMEOUT_MAX:.0f}, share_min_bytes at least 1; "
            f"they are {options.timeout_s} and {options.share_min_bytes}"
        )
    try:
        _ = options.workload_settings  # checks the values
    except ConfigError as error:
        raise ConfigError(f"--model-loader-extra-config: {error}") from error
    return options


def split(extra: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Split an extra config into wooly's options and the keys of another loader.

    Raises:
        ConfigError: a value of one of wooly's keys is invalid.
    """
    ours = {key: value for key, value in extra.items() if key in Options.__dataclass_fields__}
    return parse(ours), {key: value for key, value in extra.items() if key not in ours}


def _path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    raise ValueError(f"{value!r} is not a {kind.__name__}")
