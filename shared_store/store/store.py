"""The store's state and what clients may ask of it, without sockets.

Everything here runs in one event loop. Slow work (allocating, checking digests) is awaited in threads; after each such
await the world may have changed, and what was true before is checked again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from shared_store.base import manifest as manifests
from shared_store.base.checkpoint import FileId
from shared_store.base.digest import SIZE
from shared_store.base.errors import (
    ConnectionLostError,
    DigestMismatchError,
    ModelNotFoundError,
    NotPublisherError,
    PermissionDeniedError,
    ProtocolError,
    WoolyError,
)
from shared_store.base.keys import KEY_LENGTH, is_key
from shared_store.base.layout import Layout, Placement
from shared_store.memory import Backend, backend_for
from shared_store.protocol import keeper_messages, messages, wire
from shared_store.protocol.durable_state import MAX_FILES, DurableState, RetainedSegment
from shared_store.runtime.fds import OwnedFd
from shared_store.store.keeper_link.link import Keeping
from shared_store.store.observe.latency import RequestTimes
from shared_store.store.recovery.grace import Recovery
from shared_store.store.space.admission import Room
from shared_store.store.space.compaction import Compaction, Compactor
from shared_store.store.state.blob_union import BlobUnion
from shared_store.store.state.models import Asker, Dropped, Effect, Granted, Models, Refused, State, Withdrawn
from shared_store.store.state.records import Attachment, Client, Committed, Counts
from shared_store.store.state.segments import PublishPlan, Segments
from shared_store.store.state.turns import Leases

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_NAME = 500


class Store:
    """The node's models, segments and leases."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        limits: Mapping[str, int],
        find_backend: Callable[[str], Backend] = backend_for,
        keeping: Keeping | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin with some devices; others are looked up, in a thread, when a client names them.

        ``clock`` tells Unix seconds.
        """
        self._find_backend = find_backend
        self.keeping = keeping or Keeping()
        self.recovery = Recovery()
        self.offers: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.segments = Segments(backends, limits)
        self.models = Models(clock)
        self.leases = Leases()
        self.clients: dict[int, Client] = {}
        self.committed: dict[str, Committed] = {}
        self.withdrawn: dict[str, Committed] = {}  # by the tokens of `models`
        self.compactor = Compactor(self)
        self.room = Room(self)
        self.counts = Counts()
        self.times = RequestTimes()
        self.named = BlobUnion()  # of all committed models; the snapshot keeps both up to date
        self.mapped = BlobUnion()  # of those that have readers
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
        read = [model.key for model in self.models.all() if client.number in model.readers]
        self._carry_out(self.models.lost(client.number))
        self.let_sleep(read)
        self.compactor.lost(client.number)
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
        self.keeping.tell(keeper_messages.NoteFiles(tuple((client.uid, file, digest) for file, digest in files)))

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
        if request.key not in self.committed:  # withdrawn since this client was admitted: what is there now counts
            self.leave(client, request.key)
            return await self.open(client, request)
        return self._attachment(client, request.key)

    async def plan(self, client: Client, request: messages.Plan) -> tuple[messages.Planned, tuple[int, ...]]:
        """Say where a model's blobs go; returns the reply and the fds of existing segments, which are the caller's."""
        device = self.models.publishing(request.key, client.number).device
        if request.key in self._plans:
            raise ProtocolError(f"{request.key} has a plan already")
        if any(len(blob.digest) != SIZE or blob.nbytes < 0 for blob in request.blobs):
            raise ProtocolError("a plan with a malformed blob")
        wish = _wish(request)
        await self.room.pack(device, self.segments.needed(device, request.blobs, wish))
        self.models.publishing(request.key, client.number)  # it may have gone meanwhile
        token = f"{request.key}/{client.number}"
        plan = self.segments.plan(
            device, token, request.blobs, lambda needed: self.room.make(device, needed, request.key), wish
        )
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
        memory = await self.room.allocate(held.device, held.nbytes, request.key)
        if self._plans.get(request.key) is not plan:
            backend.release(memory)
            raise NotPublisherError(f"client {client.number} no longer publishes {request.key}")
        try:
            fd = backend.export(memory).detach()
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
        self.segments.seal(plan.segments)
        wrong = await asyncio.to_thread(self.segments.check(plan).wrong)
        self.models.publishing(request.key, client.number)  # it may have gone meanwhile
        if self._plans.get(request.key) is not plan:
            raise DigestMismatchError(f"blobs that {request.key} counts on were quarantined meanwhile; plan anew")
        if wrong:
            # Sealed, so it can never become right. Whoever publishes may plan anew.
            self._drop_plan(request.key)
            self.changed()
            blob, found = wrong[0]
            raise DigestMismatchError(
                f"bytes published as {blob.digest.hex()[:16]} are {found.hex()[:16]}: not accepted"
            )
        effects = self.models.commit(request.key, client.number)
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
        self.let_sleep([key])
        self.changed()

    def let_sleep(self, keys: Iterable[str]) -> None:
        """Drop those of the models that nobody reads while others read their host copies: those sleep, and all do.

        Pinned models stay; so do all while readers may be on their way back.
        """
        for key in keys:
            model, known = self.models.get(key), self.committed.get(key)
            if model is None or known is None or model.readers or model.pinned or self.recovering:
                continue
            copy = self.models.get(known.host_key)
            if copy is not None and copy.readers:
                self.evict([key], "its readers sleep")

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

    async def device(self, name: str) -> Backend:
        """The backend of a device; one that is new is looked for. Raises :class:`UnknownDeviceError`."""
        if name not in self.segments.backends:
            self.segments.add_device(await asyncio.to_thread(self._find_backend, name))
        return self.segments.backend(name)

    def segments_of(self, key: str) -> tuple[int, ...]:
        """Ids of the segments that a committed model lies in."""
        manifest = self.committed[key].manifest
        return tuple(dict.fromkeys(self.segments.blob(manifest.device, blob.digest).segment for blob in manifest.blobs))

    @property
    def recovering(self) -> bool:
        """Whether readers may be on their way back, so that nothing is evicted or compacted."""
        return self.recovery.active

    # What the keeper holds.

    def note(self, key: str) -> None:
        """Have the keeper hold a committed model as it is now: to be called whenever that changes."""
        record = self._record(key)
        for segment in record.segments:
            held = self.segments.segment(segment)
            found = keeper_messages.SegmentRecord(segment, held.device, held.nbytes)
            self.keeping.hold(found, lambda segment=segment: self.segments.export(segment))  # type: ignore[misc]
        self.keeping.tell(keeper_messages.NoteModel(record))

    def _note_all(self, holders: Iterable[str]) -> None:
        for key in holders:
            if key in self.committed:
                self.note(key)

    def _record(self, key: str) -> keeper_messages.ModelRecord:
        committed = self.committed[key]
        blobs = (self.segments.blob(committed.manifest.device, blob.digest) for blob in committed.manifest.blobs)
        places = tuple((blob.segment, blob.offset) for blob in blobs)
        model = self.models.get(key)
        assert model is not None  # noqa: S101 - it is committed
        return keeper_messages.ModelRecord(key, committed.data, places, pinned=model.pinned, last_used=model.last_used)

    def _holdings(self) -> DurableState:
        """All that a keeper should hold, with fds of their own."""
        held = DurableState(models={key: self._record(key) for key in self.committed}, files=self._files.copy())
        try:
            for number in {segment for model in held.models.values() for segment in model.segments}:
                segment = self.segments.segment(number)
                record = keeper_messages.SegmentRecord(number, segment.device, segment.nbytes)
                held.segments[number] = RetainedSegment(record, OwnedFd(self.segments.export(number)))
        except BaseException:
            held.close()
            raise
        return held

    def pin(self, prefix: str, *, pinned: bool) -> str:
        """Keep a model from being evicted, or no longer; returns its key."""
        key = self.models.pin(prefix, pinned=pinned)
        if key in self.committed:
            self.note(key)
        self.event("pinned" if pinned else "unpinned", key=key)
        self.changed()
        return key

    def evict(self, keys: Iterable[str], reason: str) -> None:
        """Drop models that nobody reads, because room is needed."""
        for key in keys:
            manifest = self.committed[key].manifest
            self._carry_out(self.models.remove(key)[1])
            self.counts.evictions += 1
            log.info("%s is evicted: %s", manifest.name or key, reason)
            self.event("evicted", key=key, name=manifest.name, bytes=manifest.nbytes, reason=reason)
        self.changed()

    # Compaction.

    async def compact(
        self, client: Client, request: messages.Compact
    ) -> tuple[messages.Compacting | messages.Done, tuple[int, ...]]:
        """Let a client copy blobs to a new segment: its fd, then those of the old ones (the caller's)."""
        compaction = await self.compactor.begin(request.device, client)
        if compaction is None:
            return messages.Done(request.id), ()
        try:
            fds = self._export([compaction.segment, *compaction.plan.sources])
        except BaseException:
            self.compactor.cancel(compaction)
            raise
        index = {segment: number for number, segment in enumerate(compaction.plan.sources)}
        moves = tuple(
            messages.Move(index[move.source], move.start, move.offset, move.blob.nbytes, move.blob.digest)
            for move in compaction.plan.moves
        )
        target, *sources = self._describe([compaction.segment, *compaction.plan.sources])
        return messages.Compacting(request.id, target, tuple(sources), moves), fds

    async def compacted(self, client: Client, request: messages.Compacted) -> messages.Switched:
        """What a client copied is complete."""
        moved, freed = await self.compactor.end(self.compactor.of(client, request.segment))
        return messages.Switched(request.id, moved, freed)

    def switch(self, compaction: Compaction) -> tuple[int, int]:
        """From now on blobs are where they were copied to; returns bytes moved and freed."""
        moved, freed = self.segments.end_compaction(compaction.segment, compaction.plan, self.unmapped, self._note_all)
        if freed:
            self.counts.compactions += 1
            log.info("%s: %d bytes moved together, %d freed", compaction.device, moved, freed)
            self.event("compacted", device=compaction.device, moved_bytes=moved, freed_bytes=freed)
        self.changed()
        return moved, freed

    def unmapped(self, holder: str) -> bool:
        """Whether who holds a blob is a committed model that nobody reads."""
        model = self.models.get(holder)
        return model is not None and model.state is State.COMMITTED and not model.readers

    # Quarantine.

    async def quarantine(self, client: Client, request: messages.Quarantine) -> None:
        """Take segments out of service that have wrong bytes, as a client says.

        Where the host reads the memory, only what is wrong indeed; elsewhere a client of the store's uid is believed.

        Raises:
            ModelNotFoundError: there is no such model (any more).
            PermissionDeniedError: it cannot be checked, and the client is another user's.
        """
        known = self.committed.get(request.key)
        if known is None:
            raise ModelNotFoundError(f"no model with key {request.key}; `wooly models` lists them")
        device = known.manifest.device
        named = {blob.digest for blob in known.manifest.blobs}.intersection(request.digests)
        suspects = {digest: blob.segment for digest, blob in self.segments.held_by(device, named).items()}
        if (await self.device(device)).host_readable:
            wrong = await asyncio.to_thread(self.segments.recheck(device, suspects).wrong)
            bad = {suspects[blob.digest] for blob, _ in wrong}
        else:
            self.own_uid_only(client, "quarantine GPU memory")
            bad = set(suspects.values())
        if not bad:
            log.warning("client %d (pid %d): its claim against %s is wrong", client.number, client.pid, request.key)
            return
        self.withdraw(device, bad, pid=client.pid)

    def withdraw(self, device: str, segments: set[int], *, pid: int) -> None:
        """Share segments with nobody new: models that have blobs there are forgotten, who reads them goes on."""
        present = [segment for segment in sorted(segments) if self.segments.has(segment)]
        holders = set[str]().union(*(self.segments.holders(segment) for segment in present))
        for segment in present:
            self.counts.quarantines += 1
            log.error("segment %d of %s has wrong bytes: quarantined", segment, device)
            self.event("quarantined", device=device, segment=segment, pid=pid)
        for key in [key for key, plan in self._plans.items() if plan.token in holders]:
            self._drop_plan(key)
        for key in [key for key in self.committed if key in holders]:
            self.event("withdrawn", key=key, name=self.committed[key].manifest.name)
            self._carry_out(self.models.withdraw(key))
        self.segments.condemn(present)
        self.changed()

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
                self._drop_plan(effect.key)
                if self.committed.pop(effect.key, None) is not None:
                    self.keeping.tell(keeper_messages.ForgetModel(effect.key))
                    self.segments.drop(effect.key)
                elif self.withdrawn.pop(effect.key, None) is not None:
                    self.segments.drop(effect.key)
            elif isinstance(effect, Withdrawn):
                self.withdrawn[effect.token] = self.committed.pop(effect.key)
                self.keeping.tell(keeper_messages.ForgetModel(effect.key))
                self.segments.rename(effect.key, effect.token)
            else:
                self._resolve((effect.key, effect.client), effect)

    def _drop_plan(self, key: str) -> None:
        plan = self._plans.pop(key, None)
        if plan is not None:
            self.segments.drop(plan.token)

    @staticmethod
    def own_uid_only(client: Client, what: str) -> None:
        """Raises :class:`PermissionDeniedError` for another user's client, where the store could not check its word."""
        if client.uid != os.getuid():
            raise PermissionDeniedError(
                f"uid {client.uid} may not {what} of the store of uid {os.getuid()}; ask its owner"
            )

    def _publisher_of(self, key: str) -> Client | None:
        model = self.models.get(key)
        return self.clients.get(model.publisher) if model and model.publisher is not None else None

    def _holder_of(self, lease: str) -> Client | None:
        holder = self.leases.holder(lease)
        return self.clients.get(holder) if holder is not None else None


def _wish(request: messages.Plan) -> Layout | None:
    """The layout that a publisher asks for, if it does."""
    if not request.wish:
        return None
    return Layout(request.sizes, tuple(Placement(place.segment, place.offset) for place in request.wish))


def failure(error: WoolyError, request: int) -> messages.Failed:
    """The reply that tells a client of an error."""
    return messages.Failed(request, error.code, str(error))
