"""How many bytes committed models have in each of their segments, and in each tier.

Kept by model until its blobs have other locations: the owner of the state says when. So status and policy take time for
a model's segments, not for its blobs.
"""

from __future__ import annotations

from collections.abc import Mapping

from shared_store.store.state.committed import Committed
from shared_store.store.state.segments import Segments


class ModelBytes:
    """The bytes of the committed models."""

    def __init__(self, segments: Segments, committed: Mapping[str, Committed]) -> None:
        """``committed``: the models by key, as they are at each call."""
        self._segments = segments
        self._committed = committed
        self._shares: dict[str, dict[int, int]] = {}

    def shares(self, key: str) -> Mapping[int, int]:
        """Return the bytes that a committed model's blobs have in each of their segments, by the segments' ids."""
        shares = self._shares.get(key)
        if shares is None:
            shares = self._shares[key] = {}
            manifest = self._committed[key].manifest
            for blob in manifest.blobs:
                segment = self._segments.blobs.at(manifest.device, blob.digest).segment
                shares[segment] = shares.get(segment, 0) + blob.nbytes
        return shares

    def forget(self, key: str) -> None:
        """Count a model anew at the next question: its blobs have other locations, or it is not committed any more."""
        self._shares.pop(key, None)

    def by_tier(self, key: str) -> tuple[int, int, int]:
        """Return the bytes of a committed model's blobs on its device, in host memory, and in files.

        The last two are those of host copies: a blob may be on its device too.
        """
        segments, nbytes = self._segments, self._committed[key].nbytes
        if not segments.elsewhere and not segments.copied:
            return nbytes, 0, 0
        shares = self.shares(key)
        lower = sum(share for segment, share in shares.items() if segment in segments.elsewhere)
        copied = sum(share for segment, share in shares.items() if segment in segments.copied)
        filed = sum(share for segment, share in shares.items() if segment in segments.filed)
        return nbytes - lower, copied - filed, filed
