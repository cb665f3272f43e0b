"""The store's state as others see it: the status for people and programs, and the documents for the catalog."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import shared_store
from shared_store.base import status
from shared_store.catalog import schema
from shared_store.runtime.node import ensure_node_id
from shared_store.store.state.models import State
from shared_store.store.store import Store


@dataclass(frozen=True)
class Identity:
    """Which store this is: ``node`` survives restarts, ``epoch`` is this run's own."""

    node: str
    epoch: str
    hostname: str
    runtime_dir: Path
    started_at: float
    started_monotonic: float


def identify(runtime_dir: Path, node_file: Path) -> Identity:
    """The identity of a store that starts now; the node's is kept in a file beside the socket."""
    node = ensure_node_id(node_file)
    return Identity(node, os.urandom(8).hex(), socket.gethostname(), runtime_dir, time.time(), time.monotonic())


def take_status(
    store: Store, identity: Identity, *, catalog_url: str, catalog_state: Literal["ok", "down"]
) -> status.Status:
    """The snapshot for people, programs and metrics."""
    models = _models(store)
    clients = _clients(store)
    devices = tuple(
        status.DeviceStatus(
            device,
            store.segments.resident_bytes(device),
            store.segments.limits.get(device),
            store.segments.count(device),
            *store.segments.unused(device),
        )
        for device in store.segments.devices()
    )
    mapped = sum(client.mapped_bytes for client in clients)
    reasons = (*(("the catalog does not answer",) if catalog_state != "ok" else ()), *store.keeping.reasons)
    return status.Status(
        node=status.NodeStatus(identity.node, identity.hostname, str(identity.runtime_dir)),
        store=status.StoreStatus(
            os.getpid(),
            shared_store.__version__,
            round(time.monotonic() - identity.started_monotonic, 3),
            "degraded" if reasons else "ok",
            reasons,
            store.recovery.active,
        ),
        catalog=status.CatalogStatus(catalog_url, catalog_state),
        devices=devices,
        models=models,
        clients=clients,
        totals=status.Totals(sum(device.resident_bytes for device in devices), mapped, mapped - _mapped_once(store)),
        counters=status.Counters(**dataclasses.asdict(store.counts)),
        quarantine=_quarantine(store),
        requests=store.times.status(),
        keeper=store.keeping.status(),
    )


def take_catalog(store: Store, identity: Identity) -> schema.Snapshot:
    """The documents for the catalog."""
    by_key = {model.key: model for model in _models(store)}
    documents = []
    for model in store.models.all():
        committed = store.committed.get(model.key)
        shown = by_key[model.key]
        documents.append(
            schema.ModelDoc(
                key=model.key,
                name=model.name,
                engine=model.engine,
                device=model.device,
                state=shown.state,
                tensors=shown.tensors,
                nbytes=shown.bytes,
                manifest=committed.data if committed else b"",
                blobs=committed.blobs if committed else (),
            )
        )
    leases = tuple(
        schema.LeaseDoc(client.id, client.pid, client.uid, client.name, client.key, client.role)
        for client in _clients(store)
        if client.key
    )
    devices = {
        device: {
            "resident_bytes": store.segments.resident_bytes(device),
            "limit_bytes": store.segments.limits.get(device),
        }
        for device in store.segments.devices()
    }
    node = schema.NodeDoc(
        node=identity.node,
        epoch=identity.epoch,
        pid=os.getpid(),
        hostname=identity.hostname,
        version=shared_store.__version__,
        started_at=identity.started_at,
        devices=devices,
    )
    return schema.Snapshot(node, tuple(documents), leases)


def _models(store: Store) -> tuple[status.ModelStatus, ...]:
    store.named.update({key: (known.manifest.device, known.manifest) for key, known in store.committed.items()})
    shown = []
    for model in store.models.all():
        known = store.committed.get(model.key)
        shown.append(
            status.ModelStatus(
                key=model.key,
                name=model.name,
                engine=model.engine,
                device=model.device,
                state="committed" if model.state is State.COMMITTED else "publishing",
                tensors=len(known.manifest.tensors) if known else 0,
                bytes=known.nbytes if known else 0,
                unique_bytes=store.named.unique_bytes(model.key),
                readers=len(model.readers),
                pinned=model.pinned,
                last_used=model.last_used,
            )
        )
    return tuple(shown)


def _clients(store: Store) -> tuple[status.ClientStatus, ...]:
    held: list[tuple[int, str, Literal["publisher", "reader", "waiting", "idle"]]] = []
    for model in store.models.all():
        if model.publisher is not None:
            held.append((model.publisher, model.key, "publisher"))
        held += [(reader, model.key, "reader") for reader in sorted(model.readers)]
        held += [(waiter.client, model.key, "waiting") for waiter in model.waiters]
    sizes = {key: known.nbytes for key, known in store.committed.items()}
    for token, model in store.models.withdrawn().items():
        held += [(reader, token, "reader") for reader in sorted(model.readers)]
        sizes[token] = store.withdrawn[token].nbytes
    busy = {number for number, _, _ in held}
    held += [(number, "", "idle") for number in store.clients if number not in busy]
    shown = []
    for number, key, role in held:
        client = store.clients.get(number)
        if client is None:
            continue  # its connection ended; what it held goes with the same turn of the loop
        mapped = sizes[key] if role == "reader" else 0
        key = key.partition("/")[0]  # of a withdrawn model's token  # noqa: PLW2901
        private = client.private_bytes.get(key, 0)
        shown.append(
            status.ClientStatus(
                number, client.pid, client.uid, client.name, key, role, max(0, mapped - private), private
            )
        )
    return tuple(shown)


def _mapped_once(store: Store) -> int:
    """Bytes of one copy of every distinct blob that somebody reads; what a withdrawn model has is a copy of its own."""
    read = {model.key: store.committed[model.key].manifest for model in store.models.all() if model.readers}
    once = {key: (manifest.device, manifest) for key, manifest in read.items()}
    store.mapped.update(once | {token: (token, known.manifest) for token, known in store.withdrawn.items()})
    return store.mapped.nbytes


def _quarantine(store: Store) -> tuple[status.QuarantineStatus, ...]:
    withdrawn = store.models.withdrawn()
    shown = []
    for held in store.segments.quarantined():
        models = [withdrawn[token] for token in held.keepers if token in withdrawn]
        readers = set[int]().union(*(model.readers for model in models))
        keys = tuple(sorted({model.key for model in models}))
        shown.append(status.QuarantineStatus(held.device, held.id, held.nbytes, keys, len(readers)))
    return tuple(shown)
