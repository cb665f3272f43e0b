"""The arbiter's loop: looks at the pages when a workload rings, when time has come, twice a second; and decides.

One thread. It waits for nobody: sockets do not block, and a workload that is stopped, or writes nonsense, delays nobody
but itself.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections import Counter

from shared_store.base.errors import ProtocolError, UnsupportedError
from shared_store.compute import control, usage
from shared_store.compute.arbiter.account import Account
from shared_store.compute.arbiter.link import Link
from shared_store.compute.arbiter.peer import MOST_RINGS, Peer
from shared_store.compute.decision import decide
from shared_store.compute.layout import LOOK_S
from shared_store.compute.snapshot import Decision, History, Settings, Snapshot
from shared_store.runtime.fds import OwnedFds

log = logging.getLogger(__name__)

_S = 1e-9
_SOON_S = 0.0005  # the shortest sleep: a decision that is due at once has waited for this look already
_LOOKS = 3  # for one decision, while steps begin that it had not seen


class Arbiter:
    """Of one store."""

    def __init__(self, link: Link) -> None:
        """Begin without workloads."""
        self._link = link
        self._settings = Settings()
        self._history = History()
        self._stalled: frozenset[int] = frozenset()
        self._peers: dict[int, Peer] = {}
        self._accounts: dict[int, Account] = {}
        self._looked = time.monotonic_ns()
        self._selector = selectors.DefaultSelector()
        self._selector.register(link, selectors.EVENT_READ)

    def run(self) -> None:
        """Run until the store's end closes. Then every workload's socket ends."""
        report_at, wake_at = 0.0, 0.0
        try:
            while not self._link.ended:
                self._serve(min(wake_at, report_at) - time.monotonic())
                wake_at = self._decide()
                if time.monotonic() >= report_at:
                    self._report()
                    report_at = time.monotonic() + LOOK_S
        finally:
            for number in list(self._peers):
                self._forget(number)
            self._selector.close()
            self._link.close()

    def _serve(self, timeout_s: float) -> None:
        """Wait, then take up what the store and the workloads sent."""
        for key, _ in self._selector.select(max(_SOON_S, timeout_s)):
            if isinstance(key.fileobj, Peer):
                peer = key.fileobj
                if not peer.hear():
                    self._forget(peer.member.number)
                elif peer.rings > MOST_RINGS:
                    self._selector.unregister(peer)
                    peer.listened = False
        for message, fds in self._link.read():
            with fds:
                self._take(message, fds)

    def _take(self, message: control.ToArbiter, fds: OwnedFds) -> None:
        if isinstance(message, control.Rules):
            self._settings = Settings(max_hold_s=message.max_hold_s)
        elif isinstance(message, control.Add):
            self._add(message, fds)
        elif isinstance(message, control.Change):
            if (peer := self._peers.get(message.number)) is not None:
                peer.change(message)
                self._contend()
        else:
            self._accounts.pop(message.number, None)
            self._forget(message.number)

    def _add(self, add: control.Add, fds: OwnedFds) -> None:
        """Take up a workload. A page that is none ends its socket, so it goes on without turns."""
        self._forget(add.number)
        if len(fds) != 2:  # page and socket
            log.error("Workload %d came with %d descriptors, not 2", add.number, len(fds))
            return
        page, bell = fds.detach()
        try:
            now = time.monotonic_ns()
            peer = Peer(add, page, bell, now)
        except (ProtocolError, UnsupportedError) as error:
            log.error("Workload %d computes without turns: %s", add.number, error)
            return
        account = self._accounts.setdefault(add.number, Account(add.number, now * _S))
        peer.used(account.device_s)
        self._peers[add.number] = peer
        self._selector.register(peer, selectors.EVENT_READ)
        self._contend()

    def _forget(self, number: int) -> None:
        """Let a workload go, with its turn. What it used stays until the store drops it."""
        peer = self._peers.pop(number, None)
        if peer is None:
            return
        if peer.listened:
            self._selector.unregister(peer)
        peer.close()
        self._contend()

    def _contend(self) -> None:
        """Have workloads ring that share a device with others."""
        users = Counter(device for peer in self._peers.values() for device in peer.member.devices)
        for peer in self._peers.values():
            peer.contend(contended=any(users[device] > 1 for device in peer.member.devices))

    def _decide(self) -> float:
        """Look at the pages, and write what follows. Returns when to decide again, in monotonic seconds."""
        for _ in range(_LOOKS):
            now = self._look()
            snapshot = Snapshot(tuple(peer.member for peer in self._peers.values()), self._history)
            decision = decide(snapshot, self._settings, now * _S)
            if not self._take_back(decision):
                break
        self._history, self._stalled = decision.history, decision.stalled
        for number, peer in self._peers.items():
            peer.allow(decision.permits[number])
        now = time.monotonic_ns()
        for peer in self._peers.values():
            peer.tell(now)
        return float("inf") if decision.wake_at is None else decision.wake_at

    def _take_back(self, decision: Decision) -> bool:
        """Write the permits that hold a workload. Returns True if one of them has begun a step meanwhile."""
        losers = [peer for number, peer in self._peers.items() if peer.loses(decision.permits[number])]
        for peer in losers:
            peer.allow(decision.permits[peer.member.number])
        return any(peer.moved for peer in losers)

    def _look(self) -> int:
        """Read all pages, and charge what was used since the last look. Returns the time."""
        now = time.monotonic_ns()
        found = {number: peer.look(now) for number, peer in self._peers.items()}
        charges = usage.charge(
            {number: busy_s for number, (busy_s, _) in found.items()},
            {number: peer.member.devices for number, peer in self._peers.items()},
            (now - self._looked) * _S,
        )
        for number, (_, held_s) in found.items():
            account = self._accounts[number]
            account.add(charges[number], held_s)
            self._peers[number].used(account.device_s)
        self._looked = now
        return now

    def _report(self) -> None:
        """Tell the store what the workloads used, and listen again to those that rang too often."""
        now = time.monotonic_ns()
        rows = []
        for number, account in self._accounts.items():
            peer = self._peers.get(number)
            held = peer is not None and peer.held(now)
            rows.append(account.row(now * _S, held=held, stalled=number in self._stalled))
        self._link.report(rows)
        for peer in self._peers.values():
            if not peer.listened:
                self._selector.register(peer, selectors.EVENT_READ)
                peer.listened = True
            peer.rings = 0
