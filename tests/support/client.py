"""A publisher and reader without torch: a session, and mappings of the segments of one model at a time.

A test drives it in its own process or (see `actors`) in another, so arguments and results have a JSON form. A model is
a list of `[seed, nbytes]`; `content` makes the bytes from them.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import msgspec
from support.content import blob, content, manifest_of

from shared_store.base.digest import digest_at
from shared_store.base.manifest import decode
from shared_store.client.compact import _worker, compact
from shared_store.client.session import Session
from shared_store.memory import Access, Mapping, backend_for
from shared_store.runtime.fds import OwnedFds
from shared_store.sleep.sleeper import Sleeper
from shared_store.transfer.rest import Rest


class Client:
    """A session and its mappings."""

    def __init__(self, directory, name="", *, autostart=False, timeout_s=10.0, device="cpu"):
        self.backend = backend_for(device)
        self.sleeper = None
        self.sleep_timeout_s = 60.0
        self.session = Session.connect(Path(directory), name=name, autostart=autostart, timeout_s=timeout_s)
        self.mappings = []
        self.promised = []
        self.leases = []
        self.places = ()
        self.blobs = ()

    def close(self):
        self.session.close()

    def unmap_all(self):
        for mapping in self.mappings:
            if mapping is not None:
                mapping.close()
        self.mappings = []

    # Publishing, step by step.

    def open(self, key, *, publish=True, timeout_s=60.0, name="model", device=None):
        """Return `granted`, or `attached` after mapping the model."""
        device = device or self.backend.device
        found = self.session.open(key, name=name, engine="test", device=device, publish=publish, timeout_s=timeout_s)
        if found is None:
            return "granted"
        self._take(*found)
        return "attached"

    def plan(self, key, model, *, whole=False):
        """Plan the blobs, and map the existing segments. Returns for each blob if it is new.

        `whole`: `fill` writes blobs of other models in segments that return, too.
        """
        self.model = [tuple(entry) for entry in model]
        self.blobs = tuple(blob(content(seed, nbytes)) for seed, nbytes in self.model)
        planned, fds = self.session.plan(key, self.blobs, whole=whole)
        self.places = planned.places
        existing = sum(not segment.promised for segment in planned.segments)
        left = fds.detach()
        self.mappings = self._mappings(planned.segments, OwnedFds(left[:existing]))
        self.rest = Rest(planned, OwnedFds(left[existing:])) if whole else None
        if not whole:
            assert not planned.rest
        self.promised = [(index, segment.id) for index, segment in enumerate(planned.segments) if segment.promised]
        for mapping in self.mappings:
            if mapping is not None:
                mapping.map(Access.READ)
        return [place.new for place in planned.places]

    def fill(self, key, *, lie=None, half=False):
        """Fill the promised segments, and write new blobs: `lie` with a flipped bit, or only `half` of each."""
        for index, segment in self.promised:
            with self.session.fill(key, segment) as fd:
                nbytes = os.fstat(fd.fileno()).st_size
                self.mappings[index] = Mapping(self.backend, self.backend.import_fd(fd.fileno(), nbytes))
            self.mappings[index].map(Access.WRITE)
            for _, piece in self.rest.pieces(index, self.mappings[index].address) if self.rest else ():
                piece.file.read(
                    piece.offset, memoryview((ctypes.c_char * piece.nbytes).from_address(piece.address)).cast("B")
                )
        self.promised = []
        if self.rest:
            self.rest.close()
        for index, (seed, nbytes) in enumerate(self.model):
            if self.places[index].new:
                data = bytearray(content(seed, nbytes))
                if index == lie:
                    data[nbytes // 2] ^= 1
                del data[nbytes // 2 if half else nbytes :]
                ctypes.memmove(self._address(index), bytes(data), len(data))

    def unmap(self):
        for mapping in self.mappings:
            mapping.unmap()

    def commit(self, key, *, state=None):
        attached, fds = self.session.commit(manifest_of(key, self.blobs, state=state, device=self.backend.device))
        self._take(attached, fds)
        return "attached"

    def publish(self, key, model, *, whole=False):
        """Open a model, and publish it if granted. Returns `granted` or `attached`."""
        outcome = self.open(key)
        if outcome == "granted":
            self.plan(key, model, whole=whole)
            self.fill(key)
            self.unmap()
            self.commit(key)
        return outcome

    # Reading.

    def digests(self):
        """Digest the mapped bytes, in the manifest's order."""
        return [digest_at(self._address(index), one.nbytes).hex() for index, one in enumerate(self.blobs)]

    def expected(self):
        """Return the digests of the manifest."""
        return [one.digest.hex() for one in self.blobs]

    def write(self, index, text):
        """Write into a mapped blob in place."""
        data = text.encode()
        ctypes.memmove(self._address(index), data, len(data))

    def read(self, index, nbytes):
        return ctypes.string_at(self._address(index), nbytes).hex()

    def addresses(self):
        return [mapping.address for mapping in self.mappings]

    def private_bytes(self):
        return sum(mapping.private_bytes() for mapping in self.mappings)

    # Sleeping.

    def sleep(self):
        """Sleep: leave the device. Nothing is mapped afterwards."""
        self._sleeper().sleep()

    def prepare(self):
        """Read the host copy, awake."""
        self._sleeper().prepare()

    def copy_ahead(self):
        """Have host copies made ahead. Returns whether they exist."""
        return self._sleeper().copy_ahead()

    def wake(self):
        """Wake. Returns shared and private bytes."""
        woken = self._sleeper().wake()
        return [woken.shared_bytes, woken.private_bytes]

    def limit_sleep(self, timeout_s):
        """Limit the seconds that :meth:`sleep` waits for others. Before the first sleep."""
        self.sleep_timeout_s = timeout_s

    def begin_host_copies(self, key):
        """Ask for host copies, and do not make them. Returns how many are promised."""
        copies, fds = self.session.sleeping.copy_to_host(key, 10.0)
        fds.close()
        return sum(segment.promised for segment in copies.segments)

    def release_host_copies(self, key):
        self.session.sleeping.release_host_copies(key)

    def mapped(self):
        """Return the number of mapped segments."""
        return sum(mapping.access is not None for mapping in self.mappings)

    def _sleeper(self):
        if self.sleeper is None:
            self.sleeper = Sleeper(
                self.session,
                self.manifest,
                self.places,
                self.segments,
                list(enumerate(self.mappings)),
                self.backend,
                timeout_s=self.sleep_timeout_s,
            )
        return self.sleeper

    # Other requests.

    def leave(self, key):
        self.unmap_all()
        self.session.leave(key)

    def abandon(self, key, reason="test"):
        self.unmap_all()
        self.session.abandon(key, reason)

    def remove(self, key):
        return self.session.remove(key)

    def pin(self, key, *, pinned=True):
        return self.session.pin(key, pinned=pinned)

    def compact(self, device="cpu"):
        return compact(self.session, device, self.backend)._asdict()

    def begin_to_compact(self, device="cpu", *, copy=False):
        """Start a compaction, with or without the copies. Returns the number of moves and the id of the new segment."""
        task, fds = self.session.compact(device)
        if copy:
            with _worker(self.backend) as work:
                work.copy(task, fds.filenos())
        fds.close()
        return [len(task.moves), task.target.id]

    def compacted(self, segment):
        """Finish a compaction. Returns moved and freed bytes."""
        switched = self.session.compacted(segment)
        return [switched.moved_bytes, switched.freed_bytes]

    def quarantine(self, key, indexes):
        """Report blobs of the mapped model as mismatches."""
        self.session.quarantine(key, [self.blobs[index].digest for index in indexes])

    def status(self):
        return msgspec.to_builtins(self.session.status())

    def alive(self):
        return self.session.alive

    def acquire_for_good(self, lease, timeout_s=60.0):
        self.leases.append(self.session.turn(lease, timeout_s))
        self.leases[-1].__enter__()

    def store_pid(self):
        return self.session.store_pid

    def pid(self):
        return os.getpid()

    def fork(self):
        """Fork a child that uses the session, reports the error, and waits until it is killed."""
        said, say = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(said)
            try:
                self.session.status()
                text = "no error"
            except Exception as error:  # noqa: BLE001 - reported to the test
                text = f"{type(error).__name__}: {error}"
            os.write(say, text.encode())
            os.close(say)
            signal.pause()
        os.close(say)
        with os.fdopen(said, "rb") as pipe:
            return {"pid": pid, "said": pipe.read().decode()}

    # Inside.

    def _take(self, attached, fds):
        self.unmap_all()
        manifest = self.manifest = decode(attached.manifest)
        self.segments = attached.segments
        self.blobs, self.places = manifest.blobs, attached.places
        self.mappings = self._mappings(attached.segments, fds)
        for mapping in self.mappings:
            mapping.map(Access.READ)

    def _mappings(self, segments, fds):
        """Make a mapping for each segment; None for a promised one."""
        made, left = [], fds.detach()
        for segment in segments:
            if segment.promised:
                made.append(None)
                continue
            with left.pop(0) as fd:
                made.append(Mapping(self.backend, self.backend.import_fd(fd.fileno(), segment.nbytes)))
        assert not left
        return made

    def _address(self, index):
        place = self.places[index]
        return self.mappings[place.segment].address + place.offset
