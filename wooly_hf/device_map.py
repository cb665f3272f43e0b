"""Device maps that request shared weights: ``wooly``, ``wooly:DEVICE``, and dicts with such values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shared_store.base.errors import ConfigError

_NAME = "wooly"


@dataclass(frozen=True)
class Wanted:
    """A request for shared weights. ``inner``: the device map to pass to transformers."""

    inner: Any


def parse(device_map: Any) -> Wanted | None:
    """Parse a ``device_map`` argument; return None if it does not request shared weights.

    ``wooly`` is the current GPU if there is one, else the CPU. ``wooly:cpu``, ``wooly:cuda:0``, ``wooly:0`` and
    ``wooly:auto`` name the device map after the colon. A dict may mix values with and without ``wooly``.

    Raises:
        ConfigError: there is no device after the colon; the message lists examples.
    """
    if isinstance(device_map, dict):
        if not any(_requests_sharing(value) for value in device_map.values()):
            return None
        return Wanted(
            {name: _device(value) if _requests_sharing(value) else value for name, value in device_map.items()}
        )
    if not _requests_sharing(device_map):
        return None
    inner = _device(device_map)
    # Without a map, transformers loads onto the default device, and does not require accelerate.
    onto_default = inner == torch.get_default_device().type == "cpu"
    return Wanted(None if onto_default else inner)


def _requests_sharing(value: Any) -> bool:
    return isinstance(value, str) and (value == _NAME or value.startswith(f"{_NAME}:"))


def _device(value: str) -> Any:
    inner = value.removeprefix(_NAME).removeprefix(":")
    if not inner:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if inner.isdecimal():
        return int(inner)
    if inner != "auto" and not _is_device(inner):
        raise ConfigError(
            f"device_map {value!r}: {inner!r} is not a device; "
            "use wooly, wooly:cpu, wooly:cuda, wooly:cuda:0 or wooly:auto"
        )
    return inner


def _is_device(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True
