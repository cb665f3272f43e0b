"""Puts the parts of a store together. Nothing here serves or starts anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared_store.base.status import Status
from shared_store.memory import Backend, SwapFiles, Unknown, backend_for
from shared_store.protocol import messages
from shared_store.runtime.options import ServeOptions
from shared_store.store.activity_pages import ActivityPages
from shared_store.store.clients.activity import ActivityRequests
from shared_store.store.clients.checkpoints import CheckpointRequests
from shared_store.store.clients.compute import ComputeRequests
from shared_store.store.clients.files import FileRequests
from shared_store.store.clients.process import ProcessRequests
from shared_store.store.clients.reports import Reports
from shared_store.store.clients.sessions import Sessions
from shared_store.store.clients.turns import TurnRequests
from shared_store.store.clients.workload_commands import WorkloadCommands
from shared_store.store.clients.workloads import WorkloadRequests
from shared_store.store.compute.compute import Compute
from shared_store.store.devices.devices import Devices
from shared_store.store.dispatch import Dispatch, Table, plain
from shared_store.store.effects import Effects
from shared_store.store.keeper_link.channel import ControlChannel
from shared_store.store.keeper_link.confirmations import Confirmations
from shared_store.store.keeper_link.inheritance import Inheritance
from shared_store.store.keeper_link.link import KeeperLink
from shared_store.store.keeper_link.records import Records
from shared_store.store.models.administration import Administration
from shared_store.store.models.attach import Attach
from shared_store.store.models.file_copies import FileCopies
from shared_store.store.models.open import Opening
from shared_store.store.models.publish import Publishing
from shared_store.store.models.quarantine import Quarantining
from shared_store.store.models.residency import ResidencyRequests
from shared_store.store.observe.latency import RequestTimes
from shared_store.store.observe.workloads import WorkloadStatuses
from shared_store.store.recovery.arrivals import Arrivals
from shared_store.store.recovery.grace import GracePeriod
from shared_store.store.recovery.offers import Offers
from shared_store.store.recovery.restore import Restore
from shared_store.store.residency.authority import Authority
from shared_store.store.residency.deep import Deep
from shared_store.store.residency.departing import Departing
from shared_store.store.residency.explanation import Explanations
from shared_store.store.residency.node_view import NodeView
from shared_store.store.residency.policy import Settings
from shared_store.store.residency.publishers import Publishers
from shared_store.store.residency.swapper import Swapper
from shared_store.store.signals import Signals
from shared_store.store.space.admission import Admission
from shared_store.store.space.compaction import Compactor
from shared_store.store.space.compaction_requests import CompactionRequests
from shared_store.store.space.departures import Departures
from shared_store.store.space.evictor import Evictor
from shared_store.store.space.host_budget import HostBudget
from shared_store.store.space.host_compaction import HostCompaction
from shared_store.store.space.host_pressure import HostPressure
from shared_store.store.state.accounts import MemoryRules
from shared_store.store.state.residency import FILES, HOST
from shared_store.store.state.store_state import StoreState
from shared_store.store.waiting import Waiters


class Parts:
    """The parts of a store, without sockets."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        limits: Mapping[str, int],
        *,
        options: ServeOptions | None = None,
        inheritance: Inheritance | None = None,
        channel: ControlChannel | None = None,
        find_backend: Callable[[str], Backend] = backend_for,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make the parts.

        Args:
            backends: memory backends by device; others are looked up when a client names their devices.
            limits: most bytes of segments by device.
            options: settings of overcommit; None: the inheritance's, or the defaults.
            inheritance: settings, descriptors and state that the store started with.
            channel: to the keeper; None: there is none.
            find_backend: looks up a device's backend.
            clock: returns Unix seconds.
        """
        options = options or (inheritance.options if inheritance else ServeOptions(Path()))
        self.max_hold_s = options.max_hold_s
        rules = MemoryRules(options.budget, options.reserve, options.max_priority)
        self.state = StoreState(limits, clock, rules=rules)
        self.devices = Devices({FILES: SwapFiles(options.swap_dir), **backends}, find_backend)
        self.signals = Signals()
        self.waiters = Waiters()
        self.times = RequestTimes()
        self.pages = ActivityPages()
        self.confirmations = Confirmations(self.state.segments.releases, self.state.counts)
        records = Records(self.state, self.devices)
        self.keeper = KeeperLink(records, self.signals, self.confirmations, inheritance, channel)
        self.departures = Departures(self.state, self.signals)
        self.effects = Effects(self.devices, self.keeper, self.waiters, self.departures.left)
        self.evictor = Evictor(self.state, self.effects, self.signals)
        self.compactor = Compactor(self.state, self.devices, self.effects, self.signals)
        self.host_compaction = HostCompaction(self.devices, self.compactor)
        self.admission = Admission(self.state, self.devices, self.evictor, self.host_compaction, self.confirmations)
        budget = options.host_budget if options.host_budget is not None else _half_of_free(backends, inheritance)
        self.host_budget = HostBudget(self.state, self.devices, self.admission, self.evictor, budget)
        self.arrivals = Arrivals()
        self.restore = Restore(self.state, self.devices, self.keeper, self.effects, self.signals, self.arrivals)
        self.offers = Offers(self.state, self.devices, self.effects, self.keeper, self.signals, self.arrivals)
        self.grace = GracePeriod(
            self.state, self.keeper, self.signals, self.arrivals, self.offers, self.evictor, self.effects
        )
        self.sessions = Sessions(self.state, self.effects, self.signals, self.evictor, self.pages)
        self.host_pressure = HostPressure(
            self.state,
            self.devices,
            self.effects,
            self.signals,
            self.admission,
            self.evictor,
            self.host_budget,
            self.sessions.of,
        )
        self.compute = Compute(self.state.workloads, self.signals, options.max_hold_s, enabled=options.arbiter)
        self.statuses = WorkloadStatuses(self.state, self.pages, self.compute)
        self.view = NodeView(self.state, self.statuses)
        self.authority = Authority(self.state, self.devices, self.signals)
        self.departing = Departing(self.state, self.signals, self.sessions.of)
        self.deep = Deep(self.state, self.signals, self.sessions.of, options.deep_after_s)
        self.swapper = Swapper(
            self.state,
            self.view,
            self.authority,
            self.departing,
            self.signals,
            deep=self.deep,
            evict=self.admission.evict,
            confirmed=self.confirmations.wait,
            settings=Settings(options.idle_after_s, options.min_resident_s, options.turn_s),
            start_within_s=options.start_timeout_s,
        )
        self.confirmations.observe(self.swapper.changed)
        if inheritance is not None and (inheritance.restarts or inheritance.held.models):
            self.swapper.hold()
        self.requests = Requests.of(self)

    def start(self) -> None:
        """Begin what happens without a request. What an earlier store left was restored."""
        self.grace.start()
        self.host_pressure.start()

    async def close(self) -> None:
        """End all work, and release all memory. Clients are gone already."""
        await self.swapper.stop()
        await self.host_pressure.stop()
        await self.compute.stop()
        self.devices.close()

    def dispatch(self, status: Callable[[], Awaitable[Status]], stopping: asyncio.Event) -> Dispatch:
        """Return the dispatch of all requests.

        Args:
            status: returns the snapshot for `GetStatus`.
            stopping: set by `Shutdown`.
        """
        process = ProcessRequests(self.keeper, status, stopping)
        return Dispatch(self.requests.table(process), self.times, self.state.counts, self.signals)


@dataclass(frozen=True)
class Requests:
    """The handlers of a store, by the kind of request."""

    opening: Opening
    publishing: Publishing
    residency: ResidencyRequests
    quarantining: Quarantining
    administration: Administration
    compaction: CompactionRequests
    offers: Offers
    turns: TurnRequests
    files: FileRequests
    reports: Reports
    activity: ActivityRequests
    workloads: WorkloadRequests
    checkpoints: CheckpointRequests
    commands: WorkloadCommands
    compute: ComputeRequests

    @staticmethod
    def of(parts: Parts) -> Requests:
        """Make the handlers over the parts of a store."""
        state, devices, effects, signals = parts.state, parts.devices, parts.effects, parts.signals
        keeper, waiters, evictor = parts.keeper, parts.waiters, parts.evictor
        attach = Attach(state, devices, effects, signals)
        file_copies = FileCopies(state, devices, parts.admission)
        publishers = Publishers(state, parts.authority, parts.swapper)
        explanations = Explanations(state, parts.view, parts.statuses, parts.max_hold_s)
        return Requests(
            Opening(state, devices, effects, signals, waiters, parts.arrivals, evictor, attach),
            Publishing(state, devices, effects, signals, keeper, parts.admission, parts.departures, publishers, attach),
            ResidencyRequests(
                state, devices, effects, signals, keeper, parts.admission, parts.host_budget, file_copies
            ),
            Quarantining(state, devices, effects, signals),
            Administration(state, effects, signals, keeper),
            CompactionRequests(state, devices, parts.compactor),
            parts.offers,
            TurnRequests(state, effects, waiters),
            FileRequests(state, keeper),
            Reports(state, signals),
            ActivityRequests(parts.pages),
            WorkloadRequests(state, signals, parts.authority, parts.swapper, parts.sessions.of, parts.deep),
            CheckpointRequests(state, parts.deep, parts.swapper),
            WorkloadCommands(state, signals, parts.sessions, parts.departing, parts.swapper, explanations),
            ComputeRequests(state, signals, parts.compute, parts.sessions.of),
        )

    def table(self, process: ProcessRequests) -> Table:
        """Return the one handler of each class of request."""
        return {
            messages.Open: plain(self.opening.open),
            messages.Leave: plain(self.opening.leave),
            messages.Plan: plain(self.publishing.plan),
            messages.Fill: plain(self.publishing.fill),
            messages.Commit: plain(self.publishing.commit),
            messages.Abandon: plain(self.publishing.abandon),
            messages.CopyToHost: plain(self.residency.copy_to_host),
            messages.FillHostCopy: plain(self.residency.fill),
            messages.AddHostCopies: plain(self.residency.add),
            messages.GoAway: plain(self.residency.go_away),
            messages.ReleaseHostCopies: plain(self.residency.release),
            messages.Quarantine: plain(self.quarantining.quarantine),
            messages.Remove: plain(self.administration.remove),
            messages.Pin: plain(self.administration.pin),
            messages.Compact: plain(self.compaction.compact),
            messages.Compacted: plain(self.compaction.compacted),
            messages.AbandonCompaction: plain(self.compaction.abandon),
            messages.Rejoin: plain(self.offers.rejoin),
            messages.Offer: self.offers.offer,
            messages.Acquire: plain(self.turns.acquire),
            messages.Yield: plain(self.turns.yield_turn),
            messages.RecallFiles: plain(self.files.recall),
            messages.RememberFiles: plain(self.files.remember),
            messages.Report: plain(self.reports.report),
            messages.ReportFallback: plain(self.reports.report_fallback),
            messages.GetActivityPage: plain(self.activity.get_page),
            messages.Join: plain(self.workloads.join),
            messages.TakeRoom: plain(self.workloads.take_room),
            messages.ReportWorkload: plain(self.workloads.report),
            messages.OfferCheckpoints: plain(self.checkpoints.offer),
            messages.MoveWorkload: plain(self.commands.move),
            messages.JoinCompute: plain(self.compute.join),
            messages.SetShare: plain(self.compute.set_share),
            messages.SetPriority: plain(self.commands.set_priority),
            messages.ExplainWorkload: plain(self.commands.explain),
            messages.GetStatus: plain(process.get_status),
            messages.Shutdown: plain(process.shut_down),
            messages.Upgrade: plain(process.upgrade),
        }


def _half_of_free(backends: Mapping[str, Backend], inheritance: Inheritance | None) -> int | None:
    """Return half of the host memory that is free without the host copies of an earlier store; None: unknown."""
    if HOST not in backends or isinstance(free := backends[HOST].free_bytes(), Unknown):
        return None
    held = inheritance.held.segments if inheritance else {}
    copies = {found.record.host for found in held.values()}
    return (
        free + sum(held[one].record.nbytes for one in copies if one in held and held[one].record.device == HOST)
    ) // 2
