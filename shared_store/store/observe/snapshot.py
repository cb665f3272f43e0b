"""Snapshots of the state: the status for people and programs."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import shared_store
from shared_store.base import status
from shared_store.base.manifest import Manifest
from shared_store.protocol.messages.identity import PRIORITIES
from shared_store.store.activity_pages import ActivityPages
from shared_store.store.compute.compute import Compute
from shared_store.store.devices.devices import Devices
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.observe.identity import Identity
from shared_store.store.observe.latency import RequestTimes
from shared_store.store.observe.loop_times import LoopTimes
from shared_store.store.observe.workloads import WorkloadStatuses
from shared_store.store.pace import Pace
from shared_store.store.state.blob_union import BlobUnion
from shared_store.store.state.models import State
from shared_store.store.state.residency import FILES
from shared_store.store.state.store_state import StoreState

Role = Literal["publisher", "reader", "waiting", "idle"]


class Snapshots:
    """Takes snapshots. Sums over blobs are updated by difference from one snapshot to the next.

    After a restart, or after very many models came or went, a difference can be of all blobs. :meth:`catch_up` takes
    it in slices of the event loop's time; what changes meanwhile is left to the next slice, the rest to :meth:`take`.
    """

    def __init__(
        self,
        state: StoreState,
        devices: Devices,
        keeper: KeeperLink,
        times: RequestTimes,
        loop: LoopTimes,
        identity: Identity,
        pages: ActivityPages,
        compute: Compute,
    ) -> None:
        self._state = state
        self._devices = devices
        self._keeper = keeper
        self._times = times
        self._loop = loop
        self._identity = identity
        self._pages = pages
        self._compute = compute
        self._workloads = WorkloadStatuses(state, pages, compute)
        self._committed = BlobUnion()  # of all committed models
        self._mapped = BlobUnion()  # of those that have readers that are awake

    async def catch_up(self) -> None:
        """Update the sums over blobs, in slices, until :meth:`take` has little left to update."""
        pace = Pace()
        while True:
            slices = pace.slices
            await pace.through(self._committed.steps(self._of_committed()))
            await pace.through(self._mapped.steps(self._of_mapped()))
            if pace.slices == slices:
                return

    def take(self, *, catalog_url: str, catalog_state: Literal["ok", "down"]) -> status.Status:
        """Return the snapshot for people, programs and metrics."""
        with _without_collections():
            return self._take(catalog_url, catalog_state)

    def _take(self, catalog_url: str, catalog_state: Literal["ok", "down"]) -> status.Status:
        state, identity = self._state, self._identity
        clients, devices = self.clients(), self.devices()
        mapped = sum(client.mapped_bytes for client in clients)
        reasons = (*(("the catalog does not answer",) if catalog_state != "ok" else ()), *self._keeper.reasons)
        return status.Status(
            node=status.NodeStatus(identity.node, identity.hostname, str(identity.runtime_dir)),
            store=status.StoreStatus(
                os.getpid(),
                shared_store.__version__,
                round(time.monotonic() - identity.started_monotonic, 3),
                "degraded" if reasons else "ok",
                reasons,
                state.grace.active,
            ),
            catalog=status.CatalogStatus(catalog_url, catalog_state),
            devices=devices,
            models=self.models(),
            clients=clients,
            totals=status.Totals(
                sum(device.resident_bytes for device in devices), mapped, mapped - self._mapped_once()
            ),
            counters=state.counts.snapshot(),
            quarantine=self._quarantine(),
            requests=self._times.status(),
            keeper=self._keeper.status(),
            loop=self._loop.status(),
            workloads=self._workloads.workload_statuses(time.monotonic()),
            overcommit=self._overcommit(),
            arbiter=self._compute.arbiter_status(),
        )

    def devices(self) -> tuple[status.DeviceStatus, ...]:
        """Return the devices that have a backend or segments."""
        accounts, segments = self._state.accounts, self._state.segments
        return tuple(
            self._device(device)
            for device in dict.fromkeys([*self._devices.backends, *segments.devices(), *accounts.devices()])
            if device != FILES
        )

    def _device(self, device: str) -> status.DeviceStatus:
        segments, account = self._state.segments, self._state.accounts.account(device)
        return status.DeviceStatus(
            device,
            segments.resident_bytes(device),
            segments.limits.get(device),
            segments.count(device),
            *segments.unused(device),
            releasing_bytes=segments.releases.nbytes(device),
            host_bytes=segments.host_bytes(device),
            disk_bytes=segments.disk_bytes(device),
            budget_bytes=account.budget,
            reserve_bytes=account.reserve,
            free_bytes=account.free,
            granted_bytes=account.granted,
            foreign_bytes=account.foreign,
            overcommit=self._state.accounts.open(device),
            overcommit_refusal=account.refusal,
        )

    def _overcommit(self) -> status.OvercommitStatus:
        workloads = self._state.workloads
        waiting = Counter(wait.priority for wait in workloads.waits)
        return workloads.counts.status(tuple(waiting[priority] for priority in PRIORITIES))

    def models(self) -> tuple[status.ModelStatus, ...]:
        """Return the models that are committed or being published."""
        committed = self._state.committed
        self._committed.update(self._of_committed())
        shown = []
        for model in self._state.models.all():
            known = committed.get(model.key)
            resident, host, disk = self._state.model_bytes.by_tier(model.key) if known else (0, 0, 0)
            shown.append(
                status.ModelStatus(
                    key=model.key,
                    name=model.name,
                    engine=model.engine,
                    device=model.device,
                    state="committed" if model.state is State.COMMITTED else "publishing",
                    tensors=len(known.manifest.tensors) if known else 0,
                    bytes=known.nbytes if known else 0,
                    unique_bytes=self._committed.unique_bytes(model.key),
                    readers=len(model.awake),
                    away=len(model.away),
                    pinned=model.pinned,
                    last_used=model.last_used,
                    resident_bytes=resident,
                    host_bytes=host,
                    disk_bytes=disk,
                )
            )
        return tuple(shown)

    def clients(self) -> tuple[status.ClientStatus, ...]:
        """Return the leases of clients, and the clients that have none."""
        state = self._state
        sizes = {key: known.nbytes for key, known in (state.committed | state.withdrawn).items()}
        shown = []
        for number, owner, role in self.roles():
            client = state.clients.get(number)
            if client is None:
                continue  # its connection ended; its leases end in the same step of the event loop
            away = role == "reader" and self._away(number, owner)
            mapped = sizes[owner] if role == "reader" and not away else 0
            key = owner.partition("/")[0]  # the owner is a key, or the token of a withdrawn model
            private = client.private_bytes.get(key, 0)
            shown.append(
                status.ClientStatus(
                    *(number, client.pid, client.uid, client.name, key, role, max(0, mapped - private), private),
                    pid_known=client.pid_known,
                    workload=client.identity.name or client.name,
                    kind=client.identity.kind,
                    priority=client.identity.priority,
                    swap=client.identity.swap,
                    gpus=client.identity.gpus,
                    namespace=client.identity.namespace,
                    pod=client.identity.pod,
                    container=client.identity.container,
                    activity=self._activity(number),
                    away=away,
                )
            )
        return tuple(shown)

    def _away(self, client: int, owner: str) -> bool:
        model = self._state.models.get(owner)
        return model is not None and client in model.away

    def _activity(self, client: int) -> status.ActivityStatus | None:
        activity = self._pages.read(client)
        return None if activity is None else status.ActivityStatus(*activity)

    def roles(self) -> list[tuple[int, str, Role]]:
        """Return client number, owner (a key, or the token of a withdrawn model) and role of each lease."""
        roles: list[tuple[int, str, Role]] = []
        for model in self._state.models.all():
            if model.publisher is not None:
                roles.append((model.publisher, model.key, "publisher"))
            roles += [(reader, model.key, "reader") for reader in sorted(model.readers)]
            roles += [(waiter.client, model.key, "waiting") for waiter in model.waiters]
        for token, model in self._state.models.withdrawn().items():
            roles += [(reader, token, "reader") for reader in sorted(model.readers)]
        busy = {number for number, _, _ in roles}
        return [*roles, *((number, "", "idle") for number in self._state.clients if number not in busy)]

    def _mapped_once(self) -> int:
        """Return the bytes of one copy of each distinct blob that has a reader; withdrawn models count separately."""
        self._mapped.update(self._of_mapped())
        return self._mapped.nbytes

    def _of_committed(self) -> dict[str, tuple[str, Manifest]]:
        return {key: (known.manifest.device, known.manifest) for key, known in self._state.committed.items()}

    def _of_mapped(self) -> dict[str, tuple[str, Manifest]]:
        state = self._state
        read = {model.key: state.committed[model.key].manifest for model in state.models.all() if model.awake}
        once = {key: (manifest.device, manifest) for key, manifest in read.items()}
        return once | {token: (token, known.manifest) for token, known in state.withdrawn.items()}

    def _quarantine(self) -> tuple[status.QuarantineStatus, ...]:
        withdrawn = self._state.models.withdrawn()
        shown = []
        for entry in self._state.segments.quarantined():
            models = [withdrawn[token] for token in entry.references if token in withdrawn]
            readers = set[int]().union(*(model.readers for model in models))
            keys = tuple(sorted({model.key for model in models}))
            shown.append(status.QuarantineStatus(entry.device, entry.id, entry.nbytes, keys, len(readers)))
        return tuple(shown)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Start no garbage collection within the block.

    A snapshot makes thousands of objects, none in a cycle. They are gone right after it, but would meanwhile start a
    collection of all others.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
