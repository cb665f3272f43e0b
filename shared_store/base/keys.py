"""Weight keys: a digest of every fact that shapes a model's final tensors.

Processes with equal keys share tensors. Does not promise that models with different keys differ.
"""

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
    """Encode as canonical JSON: sorted keys, no white space. Equal values give equal bytes, different ones different.

    Numbers without a JSON form are written by their names (``NaN``, ``Infinity``), because ``null`` would make them
    equal.

    Raises:
        UnsupportedError: a value has no JSON form. A guess, such as a ``repr`` with an address, could make different
            models equal or equal models different.
    """
    try:
        plain = msgspec.to_builtins(value, str_keys=True, order="deterministic")
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"the model's identity has no canonical JSON form: {error}") from error


_NAMES = ("_name_or_path", "transformers_version", "_commit_hash", "name_or_path")


def without_names(config: Any) -> Any:
    """Return a model's configuration (plain JSON types) without names that tell where it was loaded from."""
    if isinstance(config, dict):
        return {key: without_names(inner) for key, inner in config.items() if key not in _NAMES}
    return [without_names(inner) for inner in config] if isinstance(config, list) else config


def is_key(text: str) -> bool:
    """True if a text has the form of a weight key."""
    return len(text) == KEY_LENGTH and set(text) <= set("0123456789abcdef")


def weight_key(checkpoint: bytes, facts: Mapping[str, Any]) -> str:
    """Return the key of a model's final tensors.

    Args:
        checkpoint: :func:`shared_store.base.checkpoint.checkpoint_digest` of its files.
        facts: everything else that shapes the final tensors: engine, version, configuration, dtype, ranks. A fact too
            many costs a load. A missing fact would serve wrong weights.

    Returns:
        64 hexadecimal digits.
    """
    return blake3(canonical({"checkpoint": checkpoint.hex(), "facts": facts}), derive_key_context=_CONTEXT).hexdigest()


def host_key(key: str, digests: Iterable[bytes]) -> str:
    """Return the key of a host copy: of a model's key and its blobs' digests, in the manifest's order."""
    named = key.encode() + b"".join(digests)
    return blake3(named, derive_key_context=_HOST_CONTEXT).hexdigest()
