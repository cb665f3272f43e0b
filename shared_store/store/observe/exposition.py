"""Prometheus metrics of a status. A scrape exposes one snapshot, so its numbers are consistent.

Names are ``wooly_`` and the status's field. Sizes are bytes, durations seconds. New counters of the status are exposed
automatically; any other new field needs a line here and in ``deploy/grafana``. The endpoint adds the kernel's metrics
of the process (``process_*``).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shared_store.base.status import LATENCY_BOUNDS_S, PAUSE_BOUNDS_S, Counters, PauseStatus, Status
from shared_store.store.observe.compute_exposition import compute
from shared_store.store.observe.families import buckets, gauge, single
from shared_store.store.observe.overcommit_exposition import overcommit

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODEL_STATES: Final = ("publishing", "committed")
_ROLES: Final = ("publisher", "reader", "waiting", "idle")


class StatusCollector(Collector):
    """The metrics of one snapshot."""

    def __init__(self, status: Status) -> None:
        """Expose this status."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield all metric families."""
        yield from self._node()
        yield from self._devices()
        yield from self._models()
        for field in msgspec.structs.fields(Counters):
            name = f"wooly_{field.name}"
            text = f"{field.name.replace('_', ' ').capitalize()} since the store started."
            yield CounterMetricFamily(name, text, getattr(self._status.counters, field.name))
        yield self._requests()
        yield from self._loop()
        yield from overcommit(self._status)
        yield from compute(self._status)

    def _node(self) -> Iterator[Metric]:
        status = self._status
        yield gauge("wooly_build_info", "The store's version.", ("version",), [((status.store.version,), 1)])
        yield single("wooly_up", "1 if the store answers.", 1)
        yield single(
            "wooly_degraded",
            "1 if the store serves while the catalog or the keeper does not work.",
            status.store.state == "degraded",
        )
        yield single("wooly_uptime_seconds", "Seconds since the store started.", status.store.uptime_s)
        yield single("wooly_catalog_up", "1 if the catalog's server accepts writes.", status.catalog.state == "ok")
        yield single(
            "wooly_mapped_bytes", "Shared bytes that readers map, summed over readers.", status.totals.mapped_bytes
        )
        yield single(
            "wooly_saved_bytes",
            "Mapped bytes, less one copy of every distinct blob among them.",
            status.totals.saved_bytes,
        )
        yield single(
            "wooly_private_bytes",
            "Private bytes that readers report: small tensors, and pages that they wrote to.",
            sum(client.private_bytes for client in status.clients),
        )

        if (keeper := status.keeper) is not None:
            yield single("wooly_keeper_up", "1 if a crash of the store loses nothing.", keeper.state == "ok")
            yield CounterMetricFamily("wooly_store_restarts", "Restarts of the store by the keeper.", keeper.restarts)

    def _devices(self) -> Iterator[Metric]:
        devices = self._status.devices
        yield gauge(
            "wooly_resident_bytes",
            "Bytes that the store has allocated.",
            ("device",),
            [((device.id,), device.resident_bytes) for device in devices],
        )
        yield gauge(
            "wooly_limit_bytes",
            "Limit of the bytes that the store allocates; absent without a limit.",
            ("device",),
            [((device.id,), device.limit_bytes) for device in devices if device.limit_bytes is not None],
        )
        yield gauge(
            "wooly_segments",
            "Segments allocated.",
            ("device",),
            [((device.id,), device.segments) for device in devices],
        )
        yield gauge(
            "wooly_dead_bytes",
            "Resident bytes of blobs that are no longer referenced.",
            ("device",),
            [((device.id,), device.dead_bytes) for device in devices],
        )
        yield gauge(
            "wooly_padding_bytes",
            "Resident bytes between blobs and at the ends of segments.",
            ("device",),
            [((device.id,), device.padding_bytes) for device in devices],
        )
        yield gauge(
            "wooly_host_copy_bytes",
            "Bytes of host copies of a device's segments. They are resident bytes of cpu.",
            ("device",),
            [((device.id,), device.host_bytes) for device in devices],
        )
        yield gauge(
            "wooly_disk_copy_bytes",
            "Bytes of copies of a device's segments that are files of the swap directory.",
            ("device",),
            [((device.id,), device.disk_bytes) for device in devices],
        )
        quarantined = Counter[str]()
        for segment in self._status.quarantine:
            quarantined[segment.device] += segment.bytes
        yield gauge(
            "wooly_quarantined_bytes",
            "Resident bytes of quarantined segments, which readers still map.",
            ("device",),
            [((device.id,), quarantined[device.id]) for device in devices],
        )

    def _models(self) -> Iterator[Metric]:
        models = self._status.models
        states = Counter[str](model.state for model in models)
        yield gauge("wooly_models", "Models.", ("state",), [((state,), states[state]) for state in _MODEL_STATES])
        roles = Counter[str](client.role for client in self._status.clients)
        yield gauge(
            "wooly_clients",
            "Clients; a client of several models counts once for each.",
            ("role",),
            [((role,), roles[role]) for role in _ROLES],
        )
        labels = ("key", "name")
        yield gauge(
            "wooly_model_readers",
            "Readers that map a model.",
            labels,
            [((one.key, one.name), one.readers) for one in models],
        )
        yield gauge(
            "wooly_model_away_readers",
            "Readers of a model that sleep.",
            labels,
            [((one.key, one.name), one.away) for one in models],
        )
        yield gauge(
            "wooly_model_tier_bytes",
            "Bytes of a model's blobs by tier: on its device, in host copies, in files alone. A blob may be in two.",
            (*labels, "tier"),
            [
                ((one.key, one.name, tier), nbytes)
                for one in models
                for tier, nbytes in (
                    ("resident", one.resident_bytes),
                    ("host", one.host_bytes),
                    ("disk", one.disk_bytes),
                )
            ],
        )
        yield gauge(
            "wooly_model_bytes",
            "Bytes of a model's tensors.",
            labels,
            [((one.key, one.name), one.bytes) for one in models],
        )
        yield gauge(
            "wooly_model_unique_bytes",
            "Bytes of a model's blobs that no other model has: removing it frees at most as many.",
            labels,
            [((one.key, one.name), one.unique_bytes) for one in models],
        )

    def _requests(self) -> Metric:
        family = HistogramMetricFamily(
            "wooly_request_duration_seconds",
            "Duration of a client's request, including the wait for other clients.",
            labels=("request",),
        )
        for one in self._status.requests:
            family.add_metric((one.name,), buckets(LATENCY_BOUNDS_S, one.classes), one.total_s)
        return family

    def _loop(self) -> Iterator[Metric]:
        loop = self._status.loop
        if loop is None:
            return
        yield _pauses(
            "wooly_loop_callback_seconds",
            "Duration of the event loop's callbacks: meanwhile no other client is answered.",
            loop.callbacks,
        )
        yield single(
            "wooly_loop_callback_longest_seconds", "Duration of the longest callback.", loop.callbacks.longest_s
        )
        yield single(
            "wooly_loop_callback_longest_cpu_seconds", "CPU time of the callback that took most.", loop.longest_cpu_s
        )
        yield _pauses("wooly_gc_pause_seconds", "Duration of garbage collections.", loop.collections)


def _pauses(name: str, text: str, pauses: PauseStatus) -> Metric:
    family = HistogramMetricFamily(name, text)
    family.add_metric((), buckets(PAUSE_BOUNDS_S, pauses.classes), pauses.total_s)
    return family
