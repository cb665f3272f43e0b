"""Models come back to a store: from its keeper when it starts, and from clients that offer what they kept.

What is trusted: fds that the keeper held, because this user's store gave them to it. A client's host memory counts
once it is sealed and its digests are right. A GPU's memory cannot be read here, so for it only a client of the store's
own user is believed, and only as far as the journal does not say otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping

from shared_store.base.errors import (
    DigestMismatchError,
    MemoryBackendError,
    ModelNotFoundError,
    OfferRefusedError,
    PermissionDeniedError,
    WoolyError,
)
from shared_store.base.manifest import Blob
from shared_store.memory import Backend, FdSegment, Segment
from shared_store.protocol import keeper_messages, messages, wire
from shared_store.protocol.durable_state import DurableState, RetainedSegment
from shared_store.runtime.fds import OwnedFd, duplicate
from shared_store.store.recovery.grace import GRACE_S, OfferedModel, Recovery, check_memory
from shared_store.store.state.digest_check import Check, Part
from shared_store.store.state.records import Client, Committed
from shared_store.store.store import Store

log = logging.getLogger(__name__)


def restore(store: Store, held: DurableState) -> None:
    """Take in what an earlier store left. What contradicts itself is dropped, with an event.

    The fds become the store's.
    """
    with _without_collections():
        _restore(store, held)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Look for no garbage while very many objects are made that stay: that takes most of the time otherwise."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _restore(store: Store, held: DurableState) -> None:
    store.recovery = Recovery(held)
    records = {number: found.record for number, found in held.segments.items()}
    for number, found in held.segments.items():
        if found.fd is not None and (problem := _wrong(store, found)):
            found.fd.close()
            store.keeping.release(number)
            _dropped(store, "segment_dropped", f"segment {number}: {problem}")
        elif found.fd is not None:
            memory = FdSegment(OwnedFd(found.fd.detach()), found.record.nbytes)
            store.segments.take_back(number, found.record.device, memory)
    here = {segment.id for segment in store.segments.all()}
    for record in held.models.values():
        try:
            model = OfferedModel.noted(record, records)
        except WoolyError as error:
            store.keeping.tell(keeper_messages.ForgetModel(record.key))
            _dropped(store, "model_dropped", f"{record.key}: {error}")
            continue
        if record.segments <= here:
            _admit(store, model, pinned=record.pinned, last_used=record.last_used)
            log.info("%s is here again: %d tensors", model.manifest.name, len(model.manifest.tensors))
        else:
            store.recovery.await_clients(record.key)
            log.info("%s may come back with a client that has it", model.manifest.name)
    store.segments.sweep()
    store.recall_all(held.files)


def end_grace(store: Store) -> None:
    """The clients had time to come back: what nobody brought is forgotten, unless somebody is just bringing it."""
    if store.recovery.active:  # longer than was thought
        left = store.recovery.until - time.monotonic()
        asyncio.get_running_loop().call_later(max(0.0, left), end_grace, store)
        return
    busy = {key for key, lock in store.offers.items() if lock.locked()}
    for key in store.recovery.end(busy):
        if key not in store.committed:
            store.keeping.tell(keeper_messages.ForgetModel(key))
            _dropped(store, "model_lost", f"{key}: no client had it any more")
    if store.recovery.awaited:
        asyncio.get_running_loop().call_later(GRACE_S, end_grace, store)
        return
    for number in store.recovery.segments:
        if not store.segments.has(number):
            store.keeping.release(number)
    store.let_sleep(list(store.committed))
    store.changed()


def rejoin(store: Store, client: Client, request: messages.Rejoin | messages.Offer, segments: set[int]) -> None:
    """A client has a model since before this store began.

    Raises:
        ModelNotFoundError: the store has not, or has it in other memory.
    """
    if request.key not in store.committed or segments != set(store.segments_of(request.key)):
        raise ModelNotFoundError(f"{request.key} is not here in these segments")
    if client.gone.is_set():
        return
    store.read_again(client, request.key, request.private_bytes)


async def take_offer(store: Store, client: Client, request: messages.Offer, fds: tuple[int, ...]) -> None:
    """A client gives a model back; it reads it from then on. The fds stay the caller's.

    Raises:
        OfferRefusedError, DigestMismatchError, MemoryBackendError, PermissionDeniedError: why it is not taken.
    """
    try:
        await _take(store, client, request, fds)
    except WoolyError as error:
        log.warning("client %d (pid %d) offers %s: refused: %s", client.number, client.pid, request.key, error)
        store.event("offer_refused", key=request.key, reason=f"{error.code}: {error}", pid=client.pid)
        raise


async def _take(store: Store, client: Client, request: messages.Offer, fds: tuple[int, ...]) -> None:
    ids = [segment.id for segment in request.segments]
    if len(fds) != len(ids) or len(set(ids)) != len(ids) or any(segment.promised for segment in request.segments):
        raise OfferRefusedError(f"{len(ids)} segments with {len(fds)} fds")
    if any(not 0 <= place.segment < len(ids) for place in request.places):
        raise OfferRefusedError("a place in a segment that is not offered")
    places = tuple((ids[place.segment], place.offset) for place in request.places)
    sizes = {segment.id: segment.nbytes for segment in request.segments}
    offered = OfferedModel.read(request.key, request.manifest, places, sizes)
    store.recovery.agree(offered)
    async with store.offers[request.key]:  # of several that offer one model, the first that is right brings it
        if request.key in store.committed:
            try:
                rejoin(store, client, request, set(ids))
            except ModelNotFoundError as error:
                raise OfferRefusedError(f"the store has {request.key} in other memory by now") from error
            return
        if store.models.get(request.key) is not None:
            raise OfferRefusedError(f"{request.key} is being published by another client")
        store.recovery.expect(request.key)  # whoever opens it now waits for the outcome
        try:
            await _check(store, client, offered, dict(zip(ids, fds, strict=True)))
            for number, fd in zip(ids, fds, strict=True):
                if not store.segments.has(number):
                    kept = FdSegment(duplicate(fd), sizes[number])
                    store.segments.take_back(number, offered.manifest.device, kept)
            _admit(store, offered, pinned=store.recovery.pinned(request.key))
        finally:
            store.recovery.settled(request.key)
        store.note(request.key)
        store.recovery.came()
        store.event("model_returned", key=request.key, pid=client.pid)
        log.info("client %d (pid %d) brought %s back", client.number, client.pid, offered.manifest.name)
        rejoin(store, client, request, set(store.segments_of(request.key)))
    await store.keeping.flushed()


async def _check(store: Store, client: Client, offered: OfferedModel, fds: Mapping[int, int]) -> None:
    """Raise where an offer's memory is not what it is said to be. Those that the store has count."""
    device = offered.manifest.device
    backend = await store.device(device)
    if not backend.host_readable and client.uid not in {os.getuid(), 0}:
        raise PermissionDeniedError(f"memory of {device} cannot be checked, so only uid {os.getuid()} may offer it")
    if not backend.host_readable and store.recovery.forgotten(offered.manifest.key):
        raise OfferRefusedError(
            f"{offered.manifest.key} was out of service before the restart, and its memory cannot be checked"
        )
    checked = None
    while checked != (here := _here(store, offered)):  # other offers may have changed that meanwhile
        checked = here
        own = {number: store.segments.export(number) for number in here}
        try:
            await asyncio.to_thread(_verify, backend, offered, {**fds, **own})
        finally:
            wire.close_fds(tuple(own.values()))


def _here(store: Store, offered: OfferedModel) -> dict[int, Segment | None]:
    """Those of an offer's segments that the store has. Raises :class:`OfferRefusedError` where it has others."""
    found = {}
    for number, nbytes in offered.segments.items():
        if store.segments.has(number):
            held = store.segments.segment(number)
            if (held.device, held.nbytes, held.writer) != (offered.manifest.device, nbytes, None):
                raise OfferRefusedError(f"segment {number} is another one here")
            found[number] = held.memory
    return found


def _verify(backend: Backend, offered: OfferedModel, fds: Mapping[int, int]) -> None:
    parts: list[Part] = []
    placed = list(zip(offered.manifest.blobs, offered.places, strict=True))
    with contextlib.ExitStack() as held:
        for number, nbytes in offered.segments.items():
            check_memory(backend, fds[number], nbytes)
            if backend.host_readable:
                memory = FdSegment(duplicate(fds[number]), nbytes)
                held.callback(memory.release)
                blobs = {(blob, at) for blob, (segment, at) in placed if segment == number}
                parts.append((backend, memory, sorted(blobs, key=_offset)))
        wrong = Check(parts).wrong()
    if wrong:
        blob, found = wrong[0]
        raise DigestMismatchError(f"bytes offered as {blob.digest.hex()[:16]} are {found.hex()[:16]}: not accepted")


def _offset(placed: tuple[Blob, int]) -> int:
    return placed[1]


def _admit(store: Store, model: OfferedModel, *, pinned: bool = False, last_used: float = 0.0) -> None:
    manifest = model.manifest
    store.models.returned(
        manifest.key,
        name=manifest.name,
        engine=manifest.engine,
        device=manifest.device,
        pinned=pinned,
        last_used=last_used,
    )
    store.segments.adopt(manifest.key, manifest.device, manifest.blobs, model.places)
    store.committed[manifest.key] = Committed(model.data, manifest)
    store.changed()


def _wrong(store: Store, found: RetainedSegment) -> str:
    """What is wrong with a segment that the keeper held, as far as the host can see."""
    backend = store.segments.backends.get(found.record.device)
    if backend is None or not backend.host_readable or found.fd is None:
        return ""
    try:
        check_memory(backend, found.fd.fileno(), found.record.nbytes)
    except MemoryBackendError as error:
        return str(error)
    return ""


def _dropped(store: Store, kind: str, detail: str) -> None:
    log.warning("%s: %s", kind.replace("_", " "), detail)
    store.event(kind, detail=detail)
