"""The store's state and what clients may ask of it, without sockets.

Everything here runs in one event loop. Slow work (allocating, checking digests) is awaited in threads; after each such
await the world may have changed, and what was true before is checked again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from shared_store import manifest as manifests
from shared_store.checkpoint import FileId
from shared_store.daemon.keeping import Keeping
from shared_store.daemon.leases import Leases
from shared_store.daemon.models import Asker, Dropped, Effect, Granted, Models, Refused
from shared_store.daemon.recovery import Recovery
from shared_store.daemon.segments import PublishPlan, Segments
from shared_store.daemon.timing import RequestTimes
from shared_store.digest import SIZE
from shared_store.errors import (
    ConnectionLostError,
    DigestMismatchError,
    ModelNotFoundError,
    NotPublisherError,
    ProtocolError,
    WoolyError,
)
from shared_store.keys import KEY_LENGTH, is_key
from shared_store.manifest import Manifest
from shared_store.memory import Backend, backend_for
from shared_store.protocol import control, messages, wire
from shared_store.protocol.holdings import MAX_FILES, HeldFd, Holdings

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_NAME = 500


@dataclass
class Client:
    """What the store knows of a connection. ``gone`` is set when it ends."""

    number: int
    pid: int
    uid: int
    name: str
    gone: asyncio.Event
    push: Callable[[str, str], None]
    private_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class Committed:
    """A committed model's manifest, as it came and as it reads."""

    data: bytes
    manifest: Manifest


@dataclass
class Counts:
    """Events since the store started."""

    attaches: int = 0
    publishes: int = 0
    aborted_publishes: int = 0
    fallbacks: int = 0
    protocol_errors: int = 0


@dataclass(frozen=True)
class Attachment:
    """What a reader needs: the manifest, a place for each of its blobs, and the fds of the segments (the caller's)."""

    manifest: bytes
    places: tuple[messages.BlobPlace, ...]
    segments: tuple[messages.SegmentInfo, ...]
    fds: tuple[int, ...]


class Store:
    """The node's models, segments and leases."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        limits: Mapping[str, int],
        find_backend: Callable[[str], Backend] = backend_for,
        keeping: Keeping | None = None,
    ) -> None:
        """Begin with some devices; others are looked up, in a thread, when a client names them."""
        self._find_backend = find_backend
        self.keeping = keeping or Keeping()
        self.recovery = Recovery()
        self.offers: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.segments = Segments(backends, limits)
        self.models = Models()
        self.leases = Leases()
        self.clients: dict[int, Client] = {}
        self.committed: dict[str, Committed] = {}
        self.counts = Counts()
        self.times = RequestTimes()
        self.changed: Callable[[], None] = lambda: None
        self.event: Callable[..., None] = lambda *_, **__: None
        self._plans: dict[str, PublishPlan] = {}
        self._waiting: dict[tuple[str, int], asyncio.Future[Effect]] = {}
        self._files: OrderedDict[tuple[int, FileId], bytes] = OrderedDict()
        self.segments.released = self.keeping.release
        self.keeping.holdings = self._holdings

    # Clients come and go.

    def join(self, client: Client) -> None:
        """A client introduced itself."""
        self.clients[client.number] = client
        self.changed()

    def lost(self, client: Client) -> None:
        """A client's connection is gone, and with it all its leases."""
        if self.clients.pop(client.number, None) is None:
            return
        for name, heir in self.leases.lost(client.number):
            self._resolve(("lease:" + name, heir), Granted(name, heir))
        publishing = [model for model in self.models.all() if model.publisher == client.number]
        for model in publishing:
            self.counts.aborted_publishes += 1
            log.warning(
                "client %d (pid %d) left while publishing %s", client.number, client.pid, model.name or model.key
            )
            self.event("publish_aborted", key=model.key, name=model.name, pid=client.pid)
        self._carry_out(self.models.lost(client.number))
        self.changed()

    # Named leases.

    async def acquire(self, client: Client, name: str, *, wait: bool = True) -> None:
        """Wait until the lease is the client's; or only get in line."""
        try:
            at_once = self.leases.acquire(name, client.number)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if wait and not at_once:
            await self._wait(client, "lease:" + name, self._holder_of(name))

    def give_back(self, client: Client, name: str) -> None:
        """The client needs the lease no more."""
        heir = self.leases.leave(name, client.number)
        if heir is not None:
            self._resolve(("lease:" + name, heir), Granted(name, heir))

    # Digests of files, remembered for the uid that told them.

    def recall(self, client: Client, files: tuple[FileId, ...]) -> tuple[bytes, ...]:
        """What is known of files."""
        return tuple(self._files.get((client.uid, file), b"") for file in files)

    def remember(self, client: Client, files: tuple[tuple[FileId, bytes], ...]) -> None:
        """Keep digests of files, dropping the oldest when there are very many."""
        if any(len(digest) != SIZE for _, digest in files):
            raise ProtocolError(f"a digest has {SIZE} bytes")
        self.recall_all({(client.uid, file): digest for file, digest in files})
        self.keeping.tell(control.NoteFiles(tuple((client.uid, file, digest) for file, digest in files)))

    def recall_all(self, files: Mapping[tuple[int, FileId], bytes]) -> None:
        """Keep digests that were told to this store or to one before it."""
        self._files.update(files)
        while len(self._files) > MAX_FILES:
            self._files.popitem(last=False)

    # Models.

    async def open(self, client: Client, request: messages.Open) -> Attachment | None:
        """Attach to a model; None: the client is to publish it."""
        if not is_key(request.key):
            raise ProtocolError(f"a weight key has {KEY_LENGTH} hexadecimal digits")
        await self.device(request.device)
        await self.recovery.wait(request.key, client.gone)
        effects = self.models.open(
            request.key,
            Asker(client.number, request.publish),
            name=request.name[:MAX_NAME],
            engine=request.engine[:MAX_NAME],
            device=request.device,
        )
        self.changed()
        outcome = effects[0] if effects else await self._wait(client, request.key, self._publisher_of(request.key))
        if isinstance(outcome, Refused):
            raise outcome.error
        if isinstance(outcome, Granted):
            log.info("client %d (pid %d) publishes %s", client.number, client.pid, request.name or request.key)
            self.event("publish_started", key=request.key, name=request.name, pid=client.pid)
            return None
        return self._attachment(client, request.key)

    def plan(self, client: Client, request: messages.Plan) -> tuple[messages.Planned, tuple[int, ...]]:
        """Say where a model's blobs go; returns the reply and the fds of existing segments, which are the caller's."""
        model = self.models.publishing(request.key, client.number)
        if request.key in self._plans:
            raise ProtocolError(f"{request.key} has a plan already")
        if any(len(blob.digest) != SIZE or blob.nbytes < 0 for blob in request.blobs):
            raise ProtocolError("a plan with a malformed blob")
        plan = self.segments.plan(model.device, f"{request.key}/{client.number}", request.blobs)
        used = list(dict.fromkeys([*plan.segments, *(place.segment for place in plan.places)]))
        try:
            fds = self._export([segment for segment in used if segment not in plan.segments])
        except BaseException:
            self.segments.drop(plan.token)
            raise
        self._plans[request.key] = plan
        self.changed()
        index = {segment: i for i, segment in enumerate(used)}
        places = tuple(messages.BlobPlace(index[place.segment], place.offset, place.new) for place in plan.places)
        return messages.Planned(request.id, places, self._describe(used, promised=plan.segments)), fds

    async def fill(self, client: Client, request: messages.Fill) -> int:
        """Allocate a promised segment; returns its fd, which is the caller's."""
        self.models.publishing(request.key, client.number)
        plan = self._plans.get(request.key)
        if plan is None or request.segment not in plan.segments:
            raise ProtocolError(f"segment {request.segment} is not promised to {request.key}")
        held = self.segments.segment(request.segment)
        if held.memory is not None:
            raise ProtocolError(f"segment {request.segment} is allocated already")
        backend = self.segments.backend(held.device)
        memory = await asyncio.to_thread(backend.create, held.nbytes)  # pages are allocated now, which takes time
        if self._plans.get(request.key) is not plan:
            backend.release(memory)
            raise NotPublisherError(f"client {client.number} no longer publishes {request.key}")
        try:
            fd = backend.export(memory)
        except BaseException:
            backend.release(memory)
            raise
        self.segments.fill(request.segment, memory)
        self.changed()
        return fd

    async def commit(self, client: Client, request: messages.Commit) -> Attachment:
        """Take what was published, once it is sealed and its digests are right."""
        model = self.models.publishing(request.key, client.number)
        plan = self._plans.get(request.key)
        if plan is None:
            raise ProtocolError(f"{request.key} was not planned")
        if not self.segments.complete(plan):
            raise ProtocolError(f"{request.key} has segments that were never filled")
        manifest = manifests.decode(request.manifest)
        if manifest.key != request.key or manifest.device != model.device or manifest.blobs != plan.blobs:
            raise ProtocolError(f"the manifest of {request.key} is not that of its plan")
        self.segments.seal(plan)
        try:
            await asyncio.to_thread(self.segments.verification(plan))
        except DigestMismatchError:
            # Sealed, so it can never become right. Whoever publishes may plan anew.
            if self._plans.get(request.key) is plan:
                del self._plans[request.key]
                self.segments.drop(plan.token)
                self.changed()
            raise
        if self._plans.get(request.key) is not plan:  # it counted on blobs that were quarantined meanwhile
            raise NotPublisherError(f"the plan for {request.key} holds no longer; plan anew")
        effects = self.models.commit(request.key, client.number)  # raises when the publisher is gone by now
        del self._plans[request.key]
        self.segments.commit(request.key, plan)
        self.committed[request.key] = Committed(request.manifest, manifest)
        self.counts.publishes += 1
        log.info("%s is published: %d tensors, %d bytes", manifest.name, len(manifest.tensors), manifest.nbytes)
        self.event("published", key=request.key, name=manifest.name, bytes=manifest.nbytes, pid=client.pid)
        self._carry_out(effects)
        self.changed()
        self.note(request.key)
        attachment = self._attachment(client, request.key)
        await self.keeping.flushed()  # what the client is told from here on must be true of the next store too
        return attachment

    def abandon(self, client: Client, key: str, reason: str) -> None:
        """The publisher gives up; the next in line gets its chance."""
        effects = self.models.give_up(key, client.number)
        self.counts.aborted_publishes += 1
        self.event("publish_abandoned", key=key, reason=reason, pid=client.pid)
        self._carry_out(effects)
        self.changed()

    def read_again(self, client: Client, key: str, private_bytes: int) -> None:
        """The client reads a committed model, and has since before this store began."""
        model = self.committed[key].manifest
        asker = Asker(client.number, publish=False)
        self.models.open(key, asker, name=model.name, engine=model.engine, device=model.device)
        self.report(client, key, private_bytes)

    def leave(self, client: Client, key: str) -> None:
        """The client wants the model no more."""
        client.private_bytes.pop(key, None)
        self._carry_out(self.models.leave(key, client.number))
        self.changed()

    def report(self, client: Client, key: str, private_bytes: int) -> None:
        """Keep what a reader says of its private bytes."""
        if private_bytes < 0:
            raise ProtocolError("negative private bytes")
        client.private_bytes[key] = private_bytes
        self.changed()

    def fallback(self, client: Client, name: str, reason: str) -> None:
        """A model was loaded the stock way."""
        self.counts.fallbacks += 1
        log.warning("client %d (pid %d) loads %s the stock way: %s", client.number, client.pid, name, reason)
        self.event("fallback", name=name, reason=reason, pid=client.pid)
        self.changed()

    def remove(self, prefix: str) -> str:
        """Drop a model that nobody uses; returns its key."""
        key, effects = self.models.remove(prefix)
        self._carry_out(effects)
        self.event("removed", key=key)
        self.changed()
        return key

    def quarantine(self, client: Client, key: str, digests: tuple[bytes, ...]) -> None:
        """A client found blobs that are not what their digests say: nobody gets their segments any more."""
        known = self.committed.get(key)
        if known is None:
            raise ModelNotFoundError(f"no model with key {key}; `wooly models` lists them")
        device = known.manifest.device
        bad = {blob.segment for blob in self.segments.held_by(device, digests).values()}
        for publishing, plan in list(self._plans.items()):
            if bad.intersection(place.segment for place in plan.places):
                del self._plans[publishing]
                self.segments.drop(plan.token)
        for other, committed in list(self.committed.items()):
            named = (blob.digest for blob in committed.manifest.blobs)
            held = self.segments.held_by(committed.manifest.device, named).values()
            if committed.manifest.device == device and any(blob.segment in bad for blob in held):
                log.error("%s has wrong bytes (client %d, pid %d): quarantined", other, client.number, client.pid)
                self.event("quarantined", key=other, name=committed.manifest.name, pid=client.pid)
                self._carry_out(self.models.quarantine(other))
        self.changed()

    async def device(self, name: str) -> Backend:
        """The backend of a device; one that is new is looked for. Raises :class:`UnknownDeviceError`."""
        if name not in self.segments.backends:
            self.segments.add_device(await asyncio.to_thread(self._find_backend, name))
        return self.segments.backend(name)

    def segments_of(self, key: str) -> tuple[int, ...]:
        """Ids of the segments that a committed model lies in."""
        manifest = self.committed[key].manifest
        return tuple(dict.fromkeys(self.segments.blob(manifest.device, blob.digest).segment for blob in manifest.blobs))

    # What the keeper holds.

    def note(self, key: str) -> None:
        """Have the keeper hold a committed model as it is now: to be called whenever that changes."""
        record = self._record(key)
        for segment in record.segments:
            held = self.segments.segment(segment)
            found = control.SegmentRecord(segment, held.device, held.nbytes)
            self.keeping.hold(found, lambda segment=segment: self.segments.export(segment))  # type: ignore[misc]
        self.keeping.tell(control.NoteModel(record))

    def _record(self, key: str) -> control.ModelRecord:
        committed = self.committed[key]
        blobs = (self.segments.blob(committed.manifest.device, blob.digest) for blob in committed.manifest.blobs)
        places = tuple((blob.segment, blob.offset) for blob in blobs)
        return control.ModelRecord(key, committed.data, places, last_used=time.time())

    def _holdings(self) -> Holdings:
        """All that a keeper should hold, with fds of their own."""
        held = Holdings(models={key: self._record(key) for key in self.committed}, files=self._files.copy())
        try:
            for number in {segment for model in held.models.values() for segment in model.segments}:
                segment = self.segments.segment(number)
                record = control.SegmentRecord(number, segment.device, segment.nbytes)
                held.segments[number] = HeldFd(record, self.segments.export(number))
        except BaseException:
            held.close()
            raise
        return held

    # Inside.

    def _attachment(self, client: Client, key: str) -> Attachment:
        committed = self.committed[key]
        device = committed.manifest.device
        blobs = [self.segments.blob(device, blob.digest) for blob in committed.manifest.blobs]
        used = list(dict.fromkeys(blob.segment for blob in blobs))
        index = {segment: i for i, segment in enumerate(used)}
        try:
            fds = self._export(used)
        except BaseException:
            self.leave(client, key)
            raise
        self.counts.attaches += 1
        self.event("attached", key=key, pid=client.pid)
        places = tuple(messages.BlobPlace(index[blob.segment], blob.offset) for blob in blobs)
        return Attachment(committed.data, places, self._describe(used), fds)

    def _export(self, segments: Iterable[int]) -> tuple[int, ...]:
        """An fd of each segment, in order; the caller's."""
        fds: list[int] = []
        try:
            for segment in segments:
                held = self.segments.segment(segment)
                if held.memory is not None:
                    fds.append(self.segments.export(segment))
        except BaseException:
            wire.close_fds(fds)
            raise
        return tuple(fds)

    def _describe(self, segments: Iterable[int], *, promised: tuple[int, ...] = ()) -> tuple[messages.SegmentInfo, ...]:
        return tuple(
            messages.SegmentInfo(segment, self.segments.segment(segment).nbytes, segment in promised)
            for segment in segments
        )

    async def _wait(self, client: Client, key: str, holder: Client | None) -> Effect:
        """Wait for an effect on this client, or for its end."""
        if holder is not None:
            client.push("waiting", f"pid {holder.pid} {holder.name}".strip())
        future: asyncio.Future[Effect] = asyncio.get_running_loop().create_future()
        self._waiting[key, client.number] = future
        gone: asyncio.Future[object] = asyncio.ensure_future(client.gone.wait())
        try:
            await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            del self._waiting[key, client.number]
        if not future.done():
            raise ConnectionLostError("the client left while it waited")
        return future.result()

    def _resolve(self, waiting: tuple[str, int], effect: Effect) -> None:
        future = self._waiting.get(waiting)
        if future is not None and not future.done():
            future.set_result(effect)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Dropped):
                plan = self._plans.pop(effect.key, None)
                if plan is not None:
                    self.segments.drop(plan.token)
                if self.committed.pop(effect.key, None) is not None:
                    self.keeping.tell(control.ForgetModel(effect.key))
                    self.segments.drop(effect.key)
            else:
                self._resolve((effect.key, effect.client), effect)

    def _publisher_of(self, key: str) -> Client | None:
        model = self.models.get(key)
        return self.clients.get(model.publisher) if model and model.publisher is not None else None

    def _holder_of(self, lease: str) -> Client | None:
        holder = self.leases.holder(lease)
        return self.clients.get(holder) if holder is not None else None


def failure(error: WoolyError, request: int) -> messages.Failed:
    """The reply that tells a client of an error."""
    return messages.Failed(request, error.code, str(error))
