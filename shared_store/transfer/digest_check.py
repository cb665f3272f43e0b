"""Digest checks of mapped blobs: compare the bytes in memory with the digests that name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from shared_store.base.errors import DigestMismatchError
from shared_store.transfer.copier import Copier, Progress, Span, ignore_progress

ExpectedSpan: TypeAlias = tuple[bytes, Span]
"""A blob's digest, and the address and size of its bytes."""


def mismatches(
    blobs: Sequence[ExpectedSpan], copier: Copier, progress: Progress = ignore_progress
) -> dict[bytes, bytes]:
    """Digest mapped blobs. Return the actual digest of each blob that differs, by the expected one."""
    found = copier.digests([span for _, span in blobs], progress)
    return {expected: actual for (expected, _), actual in zip(blobs, found, strict=True) if actual != expected}


def wrong_copy(expected: bytes, actual: bytes) -> DigestMismatchError:
    """Return the error for a copy whose bytes differ from the original's."""
    return DigestMismatchError(f"the copy of blob {expected.hex()[:16]} has digest {actual.hex()[:16]}")
