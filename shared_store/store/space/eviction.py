"""Eviction policy: a pure function of a snapshot.

Models without readers are a cache, evicted in order of least recent use unless they are pinned. Blobs are shared and
memory is released in whole segments, so evicting a model frees only segments that have no other owner. A small model's
segment of 2 MiB counts with its full size.

Does not promise to evict the fewest bytes: an old large model is evicted before two younger ones that would suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shared_store.store.state.segments import OccupiedSegment


@dataclass(frozen=True)
class CachedModel:
    """A committed model. ``last_used`` orders models; its unit does not matter."""

    key: str
    last_used: float
    readers: int
    pinned: bool

    @property
    def evictable(self) -> bool:
        """Whether it may be evicted."""
        return not self.readers and not self.pinned


def evict(models: Iterable[CachedModel], segments: Sequence[OccupiedSegment], needed: int) -> tuple[str, ...] | None:
    """Choose models to evict, to free at least ``needed`` bytes.

    Returns:
        Their keys, least recently used first; None if evicting all evictable models would not free enough. A model
        that would free nothing together with the others is not chosen.
    """
    if needed <= 0:
        return ()
    gone: set[str] = set()
    freed: list[OccupiedSegment] = []
    left = {index: len(segment.owners) for index, segment in enumerate(segments)}
    owned: dict[str, list[int]] = {}
    for index, segment in enumerate(segments):
        for owner in segment.owners:
            owned.setdefault(owner, []).append(index)
    order = sorted((model for model in models if model.evictable), key=lambda model: (model.last_used, model.key))
    for model in order:
        gone.add(model.key)
        for index in owned.get(model.key, ()):
            left[index] -= 1
            if not left[index]:
                freed.append(segments[index])
        if sum(segment.nbytes for segment in freed) >= needed:
            useful = {owner for segment in freed for owner in segment.owners}
            return tuple(model.key for model in order if model.key in gone & useful)
    return None
