"""Eviction policy: pure functions of a snapshot.

Models without readers are a cache, evicted in order of least recent use unless they are pinned. Blobs are shared and
memory is released in whole segments, so evicting a model frees only segments that have no other owner. A small model's
segment of 2 MiB counts with its full size.

No more is evicted than must be: without any one of the chosen models, too little would be freed. Does not promise to
evict the fewest bytes: an old large model is evicted before two younger ones that would suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shared_store.store.state.segment_entry import OccupiedSegment


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


def evict(models: Sequence[CachedModel], segments: Sequence[OccupiedSegment], needed: int) -> tuple[str, ...] | None:
    """Choose models to evict, to free at least ``needed`` bytes.

    The first models in order of last use that free enough, less those that are not needed for that beside the others,
    of which the most recently used are spared first.

    Returns:
        Their keys, least recently used first; None if evicting all evictable models would not free enough.
    """
    if needed <= 0:
        return ()
    owned = _owned(segments)
    left = [len(segment.owners) for segment in segments]
    order = _by_last_use(models)
    chosen: list[CachedModel] = []
    freed = 0
    for model in order:
        chosen.append(model)
        for index in owned.get(model.key, ()):
            left[index] -= 1
            if not left[index]:
                freed += segments[index].nbytes
        if freed >= needed:
            break
    else:
        return None
    spared: set[str] = set()
    for model in reversed(chosen):
        freed_with_it = [index for index in owned.get(model.key, ()) if not left[index]]
        least = freed - sum(segments[index].nbytes for index in freed_with_it)
        if least >= needed:
            spared.add(model.key)
            freed = least
            for index in owned.get(model.key, ()):
                left[index] += 1
    return tuple(model.key for model in chosen if model.key not in spared)


def evict_one(
    models: Sequence[CachedModel], segments: Sequence[OccupiedSegment], most: int | None
) -> tuple[str, ...] | None:
    """Choose the next model to evict where nobody knows how many bytes are missing.

    The caller evicts it, tries to allocate, and asks again. Of the models that surely free enough, the least recently
    used is chosen: no other is evicted then. Without one, the model that frees most: a later one cannot make an earlier
    one superfluous, as it could in order of last use.

    Args:
        models: of the device.
        segments: of the device.
        most: the most bytes that can be missing, before the first eviction; None afterwards.

    Returns:
        Its key. Several keys if models free something only together; None if eviction frees nothing.
    """
    alone = dict.fromkeys((model.key for model in models), 0)
    for segment in segments:
        if len(segment.owners) == 1:
            (owner,) = segment.owners
            if owner in alone:
                alone[owner] += segment.nbytes
    order = [model for model in _by_last_use(models) if alone[model.key]]
    if not order:
        return evict(models, segments, 1)
    enough = [] if most is None else [model for model in order if alone[model.key] >= most]
    return ((enough[0] if enough else max(order, key=lambda model: alone[model.key])).key,)


def _by_last_use(models: Iterable[CachedModel]) -> list[CachedModel]:
    return sorted((model for model in models if model.evictable), key=lambda model: (model.last_used, model.key))


def _owned(segments: Sequence[OccupiedSegment]) -> dict[str, list[int]]:
    """Return the indexes of each owner's segments."""
    owned: dict[str, list[int]] = {}
    for index, segment in enumerate(segments):
        for owner in segment.owners:
            owned.setdefault(owner, []).append(index)
    return owned
