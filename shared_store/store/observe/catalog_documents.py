"""Snapshots of the state as documents for the catalog."""

from __future__ import annotations

import os

import shared_store
from shared_store.catalog import BlobDoc, schema
from shared_store.store.observe.identity import Identity
from shared_store.store.observe.snapshot import Snapshots
from shared_store.store.state.blob_union import distinct
from shared_store.store.state.committed import Committed
from shared_store.store.state.store_state import StoreState


class CatalogDocuments:
    """Makes documents. The blobs of a committed model are listed once and kept for the next snapshots."""

    def __init__(self, state: StoreState, snapshots: Snapshots, identity: Identity) -> None:
        self._state = state
        self._snapshots = snapshots
        self._identity = identity
        self._blobs: dict[str, tuple[Committed, tuple[BlobDoc, ...]]] = {}

    def take(self) -> schema.Snapshot:
        """Return the documents of the node, its models and its leases."""
        committed = self._state.committed
        self._blobs = {key: self._listed(key, known) for key, known in committed.items()}
        documents = tuple(
            schema.ModelDoc(
                key=model.key,
                name=model.name,
                engine=model.engine,
                device=model.device,
                state=model.state,
                tensors=model.tensors,
                nbytes=model.bytes,
                manifest=committed[model.key].data if model.key in committed else b"",
                blobs=self._blobs[model.key][1] if model.key in committed else (),
            )
            for model in self._snapshots.models()
        )
        leases = tuple(
            schema.LeaseDoc(client.id, client.pid, client.uid, client.name, client.key, client.role)
            for client in self._snapshots.clients()
            if client.key
        )
        return schema.Snapshot(self._node(), documents, leases)

    def _listed(self, key: str, known: Committed) -> tuple[Committed, tuple[BlobDoc, ...]]:
        listed = self._blobs.get(key)
        if listed is not None and listed[0] is known:
            return listed
        return known, tuple(BlobDoc(digest, nbytes) for digest, nbytes in distinct(known.manifest).items())

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
