"""The device maps that ask for shared weights: ``wooly``, ``wooly:DEVICE``, and dicts with such values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shared_store.base.errors import ConfigError

_NAME = "wooly"


@dataclass(frozen=True)
class Wanted:
    """Weights that are to be shared. ``inner``: the device map that transformers gets."""

    inner: Any


def parse(device_map: Any) -> Wanted | None:
    """Read a ``device_map`` argument; None where it does not ask for shared weights.

    ``wooly`` is the current GPU where there is one, else the CPU; ``wooly:cpu``, ``wooly:cuda:0``, ``wooly:0`` and
    ``wooly:auto`` are what comes after the colon. In a dict, modules with and without it may stand beside each other.

    Raises:
        ConfigError: what comes after the colon is no device; the message says what would be one.
    """
    if isinstance(device_map, dict):
        if not any(_asks(value) for value in device_map.values()):
            return None
        return Wanted({name: _device(value) if _asks(value) else value for name, value in device_map.items()})
    if not _asks(device_map):
        return None
    inner = _device(device_map)
    # Without any map transformers loads onto the default device, and does not need accelerate for it.
    onto_default = inner == torch.get_default_device().type == "cpu"
    return Wanted(None if onto_default else inner)


def _asks(value: Any) -> bool:
    return isinstance(value, str) and (value == _NAME or value.startswith(f"{_NAME}:"))


def _device(value: str) -> Any:
    inner = value.removeprefix(_NAME).removeprefix(":")
    if not inner:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if inner.isdecimal():
        return int(inner)
    if inner != "auto" and not _is_device(inner):
        raise ConfigError(
            f"device_map {value!r}: {inner!r} is no device; "
            "use wooly, wooly:cpu, wooly:cuda, wooly:cuda:0 or wooly:auto"
        )
    return inner


def _is_device(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True
