"""Snapshots of the state as documents for the catalog."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import starmap

import shared_store
from shared_store.catalog import BlobDoc, schema
from shared_store.store.observe.identity import Identity
from shared_store.store.observe.snapshot import Snapshots
from shared_store.store.pace import Pace
from shared_store.store.state.blob_union import distinct
from shared_store.store.state.committed import Committed
from shared_store.store.state.models import Model
from shared_store.store.state.store_state import StoreState


class CatalogDocuments:
    """Makes documents. Those of a model or lease that did not change are the same objects in the next snapshot."""

    def __init__(self, state: StoreState, snapshots: Snapshots, identity: Identity) -> None:
        self._state = state
        self._snapshots = snapshots
        self._identity = identity
        self._models: dict[str, tuple[Model, Committed | None, schema.ModelDoc]] = {}
        self._leases: dict[tuple[int, str, str], schema.LeaseDoc] = {}

    async def catch_up(self) -> None:
        """Make the documents of new models, in slices of the event loop's time, before :meth:`take` needs them."""
        pace = Pace()
        await pace.through(self._make(model) for model in self._state.models.all())

    def take(self) -> schema.Snapshot:
        """Return the documents of the node, its models and its leases."""
        state = self._state
        models = state.models.all()
        for model in models:
            self._make(model)
        if len(self._models) > len(models):
            self._models = {model.key: self._models[model.key] for model in models}
        return schema.Snapshot(
            self._node(), tuple(self._models[model.key][2] for model in models), tuple(self._current_leases())
        )

    def _make(self, model: Model) -> int:
        """Make the document of a model unless it has not changed; return the number of blobs visited."""
        known = self._state.committed.get(model.key)
        made = self._models.get(model.key)
        if made is not None and made[0] is model and made[1] is known:
            return 0
        document = schema.ModelDoc(
            key=model.key,
            name=model.name,
            engine=model.engine,
            device=model.device,
            state="committed" if known else "publishing",
            tensors=len(known.manifest.tensors) if known else 0,
            nbytes=known.nbytes if known else 0,
            manifest=known.data if known else b"",
            blobs=tuple(starmap(BlobDoc, distinct(known.manifest).items())) if known else (),
        )
        self._models[model.key] = (model, known, document)
        return len(document.blobs)

    def _current_leases(self) -> Iterator[schema.LeaseDoc]:
        before, self._leases = self._leases, {}
        for number, owner, role in self._snapshots.roles():
            client = self._state.clients.get(number)
            if client is None or not owner:
                continue
            key = owner.partition("/")[0]  # the owner is a key, or the token of a withdrawn model
            lease = before.get((number, key, role))
            if lease is None:
                lease = schema.LeaseDoc(number, client.pid, client.uid, client.name, key, role)
            self._leases[number, key, role] = lease
            yield lease

    def _node(self) -> schema.NodeDoc:
        return schema.NodeDoc(
            node=self._identity.node,
            epoch=self._identity.epoch,
            pid=os.getpid(),
            hostname=self._identity.hostname,
            version=shared_store.__version__,
            started_at=self._identity.started_at,
            devices={
                device.id: {"resident_bytes": device.resident_bytes, "limit_bytes": device.limit_bytes}
                for device in self._snapshots.devices()
            },
        )
