"""Publish and attach torch modules without an engine, and read the kernel's view of their memory."""

from __future__ import annotations

from pathlib import Path

from support.content import key

from shared_store.base.manifest import decode
from shared_store.memory import MemfdBackend
from shared_store.torch.bind import bind
from shared_store.torch.mapped_model import MappedModel
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.publish import Publication, publish

MIN_BYTES = 1 << 12
KEY = key(0xAB)


def grant(session, model_key=KEY):
    """Open a model that is not in the store, to be granted its publication."""
    opened = session.open(model_key, name="model", engine="test", device="cpu", publish=True, timeout_s=30)
    assert opened is None


def publish_model(session, model, model_key=KEY, *, state=None, min_bytes=MIN_BYTES, **options):
    """Publish a model; return the manifest, its mapped blobs, and the result of binding."""
    grant(session, model_key)
    publication = Publication(model_key, "model", "test", "cpu", state or {})
    return publish(session, publication, model, MemfdBackend(), min_bytes=min_bytes, **options)


def attach(session, model_key=KEY):
    """Return the manifest of a published model, and its mapped blobs."""
    opened = session.open(model_key, name="model", engine="test", device="cpu", publish=False, timeout_s=30)
    attached, fds = opened
    manifest = decode(attached.manifest)
    with fds:
        blobs = MappedModel(MemfdBackend(), manifest.blobs, attached.places, attached.segments, fds.filenos())
    blobs.map_for_reading()
    return manifest, blobs


def read_model(session, build, model_key=KEY, *, min_bytes=MIN_BYTES):
    """Build a model of placeholders and bind it; return it with the result of binding."""
    manifest, blobs = attach(session, model_key)
    with Placeholders(min_bytes) as placeholders:
        model = build()
    bound = bind(model, manifest, blobs, placeholders, min_bytes=min_bytes)
    return model, bound


def mapped_segments():
    """Count the mapped segments of this process."""
    return sum("memfd:wooly" in line for line in Path("/proc/self/maps").read_text().splitlines())


def memory_of(field, pid="self"):
    """Return a field of `proc_pid_status(5)`, such as `RssAnon`, in bytes."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
