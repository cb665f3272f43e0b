"""Clients without torch: publish synthetic models, and map what a store returns.

The only module of the benchmarks that handles a store's descriptors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from support.content import blob, manifest_of

from benchmarks.harness.device import Device
from shared_store.base.digest import digest
from shared_store.base.manifest import Blob, Manifest, decode
from shared_store.client.session import Session
from shared_store.memory import Access, Mapping
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds

ENGINE = "benchmark"

Attached = tuple[messages.Attached, OwnedFds]
"""A committed model and the descriptors of its segments."""


def open_model(
    session: Session, model: str, *, device: str = "cpu", publish: bool = True, timeout_s: float = 60.0
) -> Attached | None:
    """Open a model by its key; None means that the session is now its publisher."""
    return session.open(
        model, name=f"model-{model[-4:]}", engine=ENGINE, device=device, publish=publish, timeout_s=timeout_s
    )


@contextlib.contextmanager
def mapped(
    device: Device, segments: Sequence[messages.SegmentInfo], fds: OwnedFds, access: Access
) -> Iterator[list[Mapping]]:
    """Map the segments of a reply during the block. Closes ``fds``."""
    mappings: list[Mapping] = []
    try:
        with fds:
            for segment, fd in zip(segments, fds.filenos(), strict=True):
                mappings.append(Mapping(device.backend, device.backend.import_fd(fd, segment.nbytes)))
                mappings[-1].map(access)
        yield mappings
    finally:
        for mapping in mappings:
            mapping.close()


def plan(session: Session, model: str, blobs: Sequence[Blob]) -> messages.Planned:
    """Request the placements of a model that the session publishes."""
    planned, fds = session.plan(model, blobs)
    fds.close()
    return planned


def fill(session: Session, device: Device, model: str, planned: messages.Planned, contents: Sequence[bytes]) -> None:
    """Write the new blobs of a plan. ``contents`` are the bytes of all blobs, in the plan's order."""
    for index, segment in enumerate(planned.segments):
        if not segment.promised:
            continue
        fds = OwnedFds([session.fill(model, segment.id)])
        with mapped(device, (segment,), fds, Access.WRITE) as (mapping,):
            for place, data in zip(planned.places, contents, strict=True):
                if place.new and place.segment == index:
                    device.write(mapping.address + place.offset, data)


def manifest(model: str, blobs: Sequence[Blob], device: str = "cpu") -> Manifest:
    """Return a manifest with one tensor for each blob."""
    return manifest_of(model, blobs, name=f"model-{model[-4:]}", engine=ENGINE, device=device)


def publish(
    session: Session, device: Device, model: str, contents: Sequence[bytes], blobs: Sequence[Blob] | None = None
) -> None:
    """Plan, fill and commit a model that the session publishes. The session then reads it.

    Args:
        session: The publisher.
        device: Where the model is.
        model: Its weight key.
        contents: Bytes of its blobs.
        blobs: Their digests, computed here if not given.
    """
    known = blobs if blobs is not None else [blob(data) for data in contents]
    fill(session, device, model, plan(session, model, known), contents)
    session.commit(manifest(model, known, device.name))[1].close()


def load(session: Session, device: Device, model: str, contents: Sequence[bytes]) -> None:
    """Open and publish a model that is not in the store. Exits with a message if it is."""
    found = open_model(session, model, device=device.name)
    if found is not None:
        found[1].close()
        raise SystemExit(f"{model} is already in the store")
    publish(session, device, model, contents)


def wrong_blobs(device: Device, attached: messages.Attached, fds: OwnedFds) -> list[int]:
    """Return the indices of blobs whose bytes do not match their digests. Closes ``fds``."""
    blobs = decode(attached.manifest).blobs
    with mapped(device, attached.segments, fds, Access.READ) as mappings:
        return [
            index
            for index, (one, place) in enumerate(zip(blobs, attached.places, strict=True))
            if digest(device.read(mappings[place.segment].address + place.offset, one.nbytes)) != one.digest
        ]
