"""Weight keys: what must be equal for one process's final tensors to serve another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from blake3 import blake3

from shared_store.base.errors import UnsupportedError

_CONTEXT = "wooly 2026-11 weight key"
_HOST_CONTEXT = "wooly 2026-11 host copy"

KEY_LENGTH = 64
"""Characters of a key: BLAKE3-256 in hexadecimal."""


def canonical(value: Any) -> bytes:
    """Canonical JSON: keys sorted, no white space, so that equal facts give equal bytes, and different ones different.

    Numbers that JSON does not have (``NaN``, ``Infinity``) are written by those names: as ``null`` they would be one.

    Raises:
        UnsupportedError: something in it has no JSON form. Guessing one (an address in a ``repr``, say) could make
            different models equal or equal ones different.
    """
    try:
        plain = msgspec.to_builtins(value, str_keys=True, order="deterministic")
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"the model's identity has no canonical JSON form: {error}") from error


_NAMES = ("_name_or_path", "transformers_version", "_commit_hash", "name_or_path")


def without_names(config: Any) -> Any:
    """A model's configuration, in plain JSON types, without the names that say where it was found."""
    if isinstance(config, dict):
        return {key: without_names(inner) for key, inner in config.items() if key not in _NAMES}
    return [without_names(inner) for inner in config] if isinstance(config, list) else config


def is_key(text: str) -> bool:
    """Whether a text has the form of a weight key."""
    return len(text) == KEY_LENGTH and set(text) <= set("0123456789abcdef")


def weight_key(checkpoint: bytes, facts: Mapping[str, Any]) -> str:
    """The key of a model's final tensors.

    Args:
        checkpoint: :func:`shared_store.base.checkpoint.checkpoint_digest` of its files.
        facts: everything else that shapes the final tensors (engine, version, configuration, dtype, ranks, ...).
            Too much here costs a load; too little would serve wrong weights.

    Returns:
        64 hexadecimal digits.
    """
    return blake3(canonical({"checkpoint": checkpoint.hex(), "facts": facts}), derive_key_context=_CONTEXT).hexdigest()


def host_key(key: str, digests: Iterable[bytes]) -> str:
    """The key of the host copy of a model with this key and blobs of these digests, in its manifest's order."""
    named = key.encode() + b"".join(digests)
    return blake3(named, derive_key_context=_HOST_CONTEXT).hexdigest()
