"""Synthetic models: bytes made from a seed, their digests, and manifests of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from shared_store.base.digest import digest
from shared_store.base.manifest import Blob, Manifest, TensorEntry


def key(number: int) -> str:
    """Return a weight key."""
    return f"{number:064x}"


def content(seed: int | str, nbytes: int) -> bytes:
    """Return random bytes that depend on the seed only."""
    return random.Random(seed).randbytes(nbytes)


def blob(data: bytes) -> Blob:
    """Return the manifest entry of a blob."""
    return Blob(digest(data), len(data))


def manifest_of(
    model_key: str,
    blobs: Sequence[Blob],
    *,
    name: str = "model",
    engine: str = "test",
    device: str = "cpu",
    state: dict[str, Any] | None = None,
) -> Manifest:
    """Return a manifest with one uint8 tensor for each blob."""
    tensors = tuple(
        TensorEntry(f"layers.{index}", "weight", "parameter", index, "uint8", (one.nbytes,), (1,), 0, index)
        for index, one in enumerate(blobs)
    )
    return Manifest(
        key=model_key,
        name=name,
        engine=engine,
        device=device,
        blobs=tuple(blobs),
        tensors=tensors,
        state=state or {},
    )
