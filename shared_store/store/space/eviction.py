"""Which models leave when room is needed: a pure function of a snapshot.

Models without readers are a cache. They leave by least recent use, unless they are pinned. Blobs are shared and memory
is freed by whole segments, so what a departure frees depends on who else has blobs in the same segments: a segment goes
when all who hold it have gone. A small model's segment of 2 MiB counts as what it takes, not as what it needs.

Does not promise the least loss: an old large model goes before two younger ones that would have been enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CachedModel:
    """A committed model. ``last_used`` orders models; its unit does not matter."""

    key: str
    last_used: float
    readers: int
    pinned: bool

    @property
    def evictable(self) -> bool:
        """Whether nothing but the wish to keep it speaks against dropping it."""
        return not self.readers and not self.pinned


@dataclass(frozen=True)
class OccupiedSegment:
    """An allocated segment. ``holders``: keys of models, and whatever else keeps it (publishers, withdrawn models)."""

    nbytes: int
    holders: frozenset[str]


def evict(models: Iterable[CachedModel], segments: Sequence[OccupiedSegment], needed: int) -> tuple[str, ...] | None:
    """Choose models whose departure frees at least ``needed`` bytes.

    Returns:
        Their keys, least recently used first; None when even all that may leave would not free enough, in which case
        none should. A model whose departure would free nothing together with the others stays.
    """
    if needed <= 0:
        return ()
    gone: set[str] = set()
    freed: list[OccupiedSegment] = []
    left = {index: len(segment.holders) for index, segment in enumerate(segments)}
    held_by: dict[str, list[int]] = {}
    for index, segment in enumerate(segments):
        for holder in segment.holders:
            held_by.setdefault(holder, []).append(index)
    order = sorted((model for model in models if model.evictable), key=lambda model: (model.last_used, model.key))
    for model in order:
        gone.add(model.key)
        for index in held_by.get(model.key, ()):
            left[index] -= 1
            if not left[index]:
                freed.append(segments[index])
        if sum(segment.nbytes for segment in freed) >= needed:
            useful = {holder for segment in freed for holder in segment.holders}
            return tuple(model.key for model in order if model.key in gone & useful)
    return None
