"""Publish and attach torch modules without an engine, and read the kernel's view of their memory."""

from __future__ import annotations

from pathlib import Path

import torch
from support.content import key
from torch import nn

from shared_store.base.manifest import ITEM_SIZES, decode
from shared_store.memory import MemfdBackend
from shared_store.torch.bind import bind
from shared_store.torch.mapped_model import REPLICA_MIN_BYTES, MappedModel
from shared_store.torch.placeholders import Placeholders
from shared_store.torch.publish import Publication, publish

LARGE = 2 * REPLICA_MIN_BYTES // 4  # float32 elements
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


def parameter(*shape, grad=False, **options):
    return nn.Parameter(torch.empty(*shape, **options), requires_grad=grad)


class Layers(nn.Module):
    """Some MiB-sized layers with distinct values, and a reference to each outside of the modules."""

    def __init__(self, count=4, mib=1, first=0):
        super().__init__()
        elements = (mib << 20) // 4
        self.layers = nn.ParameterList(
            nn.Parameter(torch.arange(elements).float() + number, requires_grad=False)
            for number in range(first, first + count)
        )
        self.small = nn.Parameter(torch.arange(4.0), requires_grad=False)
        self.held = [layer.data for layer in self.layers]

    def assert_right(self, first=0):
        for number, (layer, held) in enumerate(zip(self.layers, self.held, strict=True), start=first):
            assert torch.equal(layer, torch.arange(layer.numel()).float() + number)
            assert held.data_ptr() == layer.data_ptr()
        assert torch.equal(self.small, torch.arange(4.0))


class Ties(nn.Module):
    """Tied parameters, one module under two names, and equal but untied ones, large and small."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embed.weight
        self.layer = nn.Linear(64, 32)
        self.alias = self.layer
        self.large_a, self.large_b = parameter(LARGE), parameter(LARGE)
        self.small_a, self.small_b = parameter(2048), parameter(2048)


def made_dtypes():
    """Every dtype that a manifest may name and this torch has."""
    return [name for name in ITEM_SIZES if hasattr(torch, name)]
