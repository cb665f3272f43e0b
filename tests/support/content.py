"""Made-up models: bytes that are told by a seed, their digests, and manifests that name them."""

from __future__ import annotations

import random

from shared_store.base.digest import digest
from shared_store.base.manifest import Blob, Manifest, TensorEntry


def key(number):
    """A weight key."""
    return f"{number:064x}"


def content(seed, nbytes):
    """Bytes that no other seed gives."""
    return random.Random(seed).randbytes(nbytes)


def blob(data):
    """What a manifest says of bytes."""
    return Blob(digest(data), len(data))


def manifest_of(model_key, blobs, *, name="model", device="cpu", state=None):
    """A manifest with one uint8 tensor for each blob."""
    tensors = tuple(
        TensorEntry(f"layers.{index}", "weight", "parameter", index, "uint8", (one.nbytes,), (1,), 0, index)
        for index, one in enumerate(blobs)
    )
    return Manifest(
        key=model_key,
        name=name,
        engine="test",
        device=device,
        blobs=tuple(blobs),
        tensors=tensors,
        state=state or {},
    )
