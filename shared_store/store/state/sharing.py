"""Which workloads use which segments: read from the models' readers, for the accounts and the policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shared_store.store.state.clients import Client
from shared_store.store.state.models import Model, State
from shared_store.store.state.residency import Residency
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import Workload


@dataclass
class SegmentUse:
    """Use of a segment that is resident.

    Attributes:
        device: where it is.
        nbytes: its size.
        readers: ids of the workloads that map it.
        held: it stays whatever workloads do: another client maps it, it is being filled or copied, or it is pinned.
        cached: only models without readers have blobs in it, so that their eviction frees it.
    """

    device: str
    nbytes: int
    readers: set[str] = field(default_factory=set)
    held: bool = False
    cached: bool = True


@dataclass
class Sharing:
    """The use of segments at one moment.

    Attributes:
        members: the clients of each workload, by its id.
        resident: segments on their devices that committed models or publications use, by id.
        maps: segments that a workload maps, or needs when it returns and that are resident; by its id.
        absent: segments that a workload needs when it returns, and that are not on their device; by its id.
        models: keys of the models that a workload reads, by its id.
    """

    members: dict[str, list[Client]] = field(default_factory=dict)
    resident: dict[int, SegmentUse] = field(default_factory=dict)
    maps: dict[str, set[int]] = field(default_factory=dict)
    absent: dict[str, set[int]] = field(default_factory=dict)
    models: dict[str, list[str]] = field(default_factory=dict)

    def shared(self, workload: Workload) -> dict[str, int]:
        """Return the bytes of segments that a workload maps, by device."""
        found: dict[str, int] = {}
        for segment in self.maps.get(workload.id, ()):
            use = self.resident[segment]
            if workload.id in use.readers:
                found[use.device] = found.get(use.device, 0) + use.nbytes
        return found


def sharing(state: StoreState) -> Sharing:
    """Return the use of all segments. Takes time for the segments of models, not for their blobs."""
    found = Sharing()
    owner: dict[int, str] = {}
    for client in state.clients.values():
        workload = state.workloads.of(client)
        if workload is not None:
            owner[client.number] = workload.id
            found.members.setdefault(workload.id, []).append(client)
    for model in state.models.all():
        if model.key in state.committed:
            _add(found, state, model, owner)
    for segment in _needed_anyway(state):
        if segment in found.resident:
            found.resident[segment].held, found.resident[segment].cached = True, False
    return found


def _add(found: Sharing, state: StoreState, model: Model, owner: Mapping[int, str]) -> None:
    """Add the segments of a committed model. ``owner``: the workload of each client that belongs to one."""
    readers = {owner[client] for client in model.awake if client in owner}
    all_readers = readers | {owner[client] for client in model.away if client in owner}
    held = model.pinned or model.state is not State.COMMITTED or any(client not in owner for client in model.awake)
    for workload in all_readers:
        found.models.setdefault(workload, []).append(model.key)
    for segment in state.model_bytes.shares(model.key):
        entry = state.segments.at(segment)
        if entry.residency is Residency.RESIDENT:
            use = found.resident.setdefault(segment, SegmentUse(entry.device, entry.nbytes))
            use.readers |= readers
            use.held |= held or entry.writer is not None or entry.quarantined
            use.cached &= not model.readers and not use.held
            needed = found.maps
        elif entry.residency is Residency.RETURNING:
            continue  # it was promised already
        else:
            needed = found.absent
        for workload in all_readers:
            needed.setdefault(workload, set()).add(segment)


def _needed_anyway(state: StoreState) -> Iterator[int]:
    """Yield segments that publications count on, that are being compacted, or that withdrawn models have."""
    for plan in state.plans.values():
        yield from plan.existing
    for compaction in state.compactions.all():
        yield from compaction.plan.sources
    for known in state.withdrawn.values():
        present = state.segments.blobs.present(known.manifest.device, (blob.digest for blob in known.manifest.blobs))
        yield from {entry.segment for entry in present.values()}
