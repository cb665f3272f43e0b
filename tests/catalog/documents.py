"""Documents for the catalog's tests, and a reader of the keys that is independent of the writer."""

import hashlib
import json
import os
from pathlib import Path

from shared_store.catalog import BlobDoc, LeaseDoc, ModelDoc, NodeDoc, Snapshot

_TESTS = str(Path(__file__).resolve().parents[1])
_BEFORE = os.environ.get("PYTHONPATH")
PROGRAMS = {**os.environ, "PYTHONPATH": f"{_TESTS}:{_BEFORE}" if _BEFORE else _TESTS}
"""The environment of programs that tests start, so that they can import this module."""


# The result of `read` for a missing node.
NOTHING = {"node": {}, "listed": set(), "models": {}, "leases": {}, "blobs": {}}


def blob(number, nbytes=4096):
    return BlobDoc(hashlib.sha256(str(number).encode()).digest(), nbytes)


def model(key, blobs=(), *, state="committed", manifest=b"\x00\xffmanifest"):
    held = tuple(blobs)
    return ModelDoc(key, f"name of {key}", "vllm", "cpu", state, len(held), sum(b.nbytes for b in held), manifest, held)


def lease(client, key="", role="reader"):
    return LeaseDoc(client, 100 + client, 1000, f"client {client}", key, role)


def node(name="n1", *, epoch="epoch-1", started_at=1000.5):
    devices = {"cpu": {"resident_bytes": 4096, "limit_bytes": None}}
    return NodeDoc(name, epoch, 77, "host.example", "0.1.0", started_at, devices)


def snapshot(models=(), leases=(), of=None):
    return Snapshot(of or node(), tuple(models), tuple(leases))


def expected(held):
    """Return the result that `read` must have for a snapshot."""
    doc = held.node
    committed = [b for m in held.models if m.state == "committed" for b in m.blobs]
    return {
        "node": {
            "node": doc.node,
            "epoch": doc.epoch,
            "pid": str(doc.pid),
            "hostname": doc.hostname,
            "version": doc.version,
            "started_at": repr(doc.started_at),
            "devices": doc.devices,
        },
        "listed": {m.key for m in held.models},
        "models": {
            m.key: {
                "key": m.key.encode(),
                "name": m.name.encode(),
                "engine": m.engine.encode(),
                "device": m.device.encode(),
                "state": m.state.encode(),
                "tensors": str(m.tensors).encode(),
                "nbytes": str(m.nbytes).encode(),
                "manifest": m.manifest,
                "blobs": str(len(m.blobs)).encode(),
            }
            for m in held.models
        },
        "leases": {
            str(ls.client): {
                "client": ls.client,
                "pid": ls.pid,
                "uid": ls.uid,
                "name": ls.name,
                "key": ls.key,
                "role": ls.role,
            }
            for ls in held.leases
        },
        "blobs": {b.digest.hex(): b.nbytes for b in committed},
    }


def read(client, name="n1"):
    """Read all keys of a node. Its blobs are read from the hash of each blob, not from the node's set."""
    info = {k.decode(): v.decode() for k, v in client.hgetall(f"wooly:node:{name}").items()}
    for of_the_server in ("heartbeat", "last_event"):
        info.pop(of_the_server, None)
    if "devices" in info:
        info["devices"] = json.loads(info["devices"])
    models = {}
    for key in client.scan_iter(f"wooly:node:{name}:model:*"):
        fields = {k.decode(): v for k, v in client.hgetall(key).items()}
        models[key.decode().rpartition(":")[2]] = fields
    listed = {key.decode() for key in client.smembers(f"wooly:node:{name}:models")}
    leases = {k.decode(): json.loads(v) for k, v in client.hgetall(f"wooly:node:{name}:leases").items()}
    blobs = {}
    for key in client.scan_iter("wooly:blob:*", count=1000):
        nbytes = client.hget(key, name)
        if nbytes is not None:
            blobs[key.decode().rpartition(":")[2]] = int(nbytes)
    return {"node": info, "listed": listed, "models": models, "leases": leases, "blobs": blobs}


def events(client):
    """Return the stream's entries as text, oldest first."""
    return [{k.decode(): v.decode() for k, v in fields.items()} for _, fields in client.xrange("wooly:events")]
