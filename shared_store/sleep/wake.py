"""Waking: obtain device memory with the layout that a model's segments had, filled with its blobs.

A segment that the store has with that layout is shared. If the store does not have the model, it is published again
from the host copy, with the former layout as the preferred one. A segment that the store has with another layout
(another process published the model, or it was compacted) is replaced by private memory of this process.

The store allocates what is shared, so its limits apply; of several processes that wake at once, one publishes.
"""

from __future__ import annotations

import contextlib
from typing import Final

from shared_store.base import manifest as manifests
from shared_store.base.errors import ConnectionLostError
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFd, OwnedFds
from shared_store.sleep.host_copy import HostCopy
from shared_store.sleep.layout import contents
from shared_store.sleep.model import NO_STORE, Model
from shared_store.transfer.copier import Copier, Progress
from shared_store.transfer.fill import fill_promised, fill_segment
from shared_store.transfer.rest import Rest

_ATTEMPTS: Final = 3
"""Stores that are asked for the model when the connection is lost each time."""


def shared_segments(model: Model, host: HostCopy, copier: Copier, progress: Progress) -> tuple[dict[int, OwnedFd], str]:
    """Attach to the model, or publish it again.

    Returns:
        A descriptor for each segment that the store has with its former layout, by index; the caller closes them.
        And why the other segments cannot be shared.

    Raises:
        OutOfMemoryError: the device, or the store's limit for it, has too little memory.
        DigestMismatchError: the host copy does not match the digests.
    """
    try:
        attached, fds, filled = _attach_or_publish(model, host, copier, progress)
    except NO_STORE as error:
        return {}, f"no store answers ({error})"
    with fds, contextlib.ExitStack() as owned:
        received = list(fds)
        found: dict[int, OwnedFd] = {}
        if manifests.decode(attached.manifest).blobs == model.manifest.blobs:
            for index in range(len(model.layout.segments)):
                segment = _position(filled[index], attached) if index in filled else None
                if segment is None:
                    segment = model.layout.unchanged(index, attached)
                if segment is not None:
                    found[index] = owned.enter_context(received[segment].dup())
        owned.pop_all()
    return found, "the store has it at other locations now"


def private_segment(model: Model, index: int, host: HostCopy, copier: Copier, progress: Progress) -> OwnedFd:
    """Allocate private memory with the layout of a segment, and fill it from the host copy. The caller closes it.

    Raises:
        OutOfMemoryError: the device has too little memory.
        DigestMismatchError: the host copy does not match the digests.
    """
    former = model.layout.segments[index]
    segment = model.backend.create(former.nbytes)
    try:
        fd = model.backend.export(segment)
    finally:
        model.backend.release(segment)  # the descriptor refers to the memory
    try:
        blobs = contents(model.manifest.blobs, former.offsets)
        fill_segment(fd, former.nbytes, blobs, host, model.backend, copier, progress)
    except BaseException:
        fd.close()
        raise
    return fd


def _attach_or_publish(
    model: Model, host: HostCopy, copier: Copier, progress: Progress
) -> tuple[messages.Attached, OwnedFds, dict[int, int]]:
    """Return the store's reply, and the ids of segments that this process filled, by index in the former layout."""
    key = model.manifest.key
    for left in reversed(range(_ATTEMPTS)):
        try:
            opened = model.open(key, model.backend.device, model.manifest.name)
            if opened is not None:
                return *opened, {}
            with model.publication(key):
                return _publish(model, host, copier, progress)
        except ConnectionLostError:
            if not left:
                raise
    raise AssertionError  # the last attempt returns or raises


def _publish(
    model: Model, host: HostCopy, copier: Copier, progress: Progress
) -> tuple[messages.Attached, OwnedFds, dict[int, int]]:
    session, layout, key, blobs = model.session, model.layout, model.manifest.key, model.manifest.blobs
    planned, fds = session.plan(key, blobs, wish=layout.locations, sizes=layout.sizes, whole=True)
    with contextlib.closing(Rest(planned, fds)) as rest:
        filled = _fill(model, planned, host, copier, progress, rest)
    return *session.commit(model.manifest), filled


def _fill(
    model: Model, planned: messages.Planned, host: HostCopy, copier: Copier, progress: Progress, rest: Rest
) -> dict[int, int]:
    """Fill the promised segments of a plan. Returns the ids of those that have a former segment's layout, by index."""
    session, layout, key, blobs = model.session, model.layout, model.manifest.key, model.manifest.blobs
    filled: dict[int, int] = {}
    to_fill = {}
    for number, info in enumerate(planned.segments):
        if not info.promised:
            continue
        offsets = {
            index: place.offset for index, place in enumerate(planned.places) if place.segment == number and place.new
        }
        former = layout.containing(offsets, info.nbytes)
        if former is not None:
            # Fill all of the former segment: this process has addresses in it even for blobs that are elsewhere by now.
            filled[former] = info.id
            to_fill[number] = contents(blobs, layout.segments[former].offsets)
        else:
            to_fill[number] = contents(blobs, offsets)
    fill_promised(session, key, planned, to_fill, host, model.backend, copier, progress, rest)
    return filled


def _position(segment: int, attached: messages.Attached) -> int | None:
    """Return the index in a reply of the segment with an id, or None."""
    return next((index for index, info in enumerate(attached.segments) if info.id == segment), None)
