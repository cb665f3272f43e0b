"""A status as Prometheus metrics: one snapshot, one scrape, so that the numbers of a scrape belong together.

Names follow the status's own: ``wooly_`` and the field. Sizes are bytes, durations seconds. A new field of the status's
counters is exposed without further ado; any other gets its line here, in the group that it belongs to, and in
``deploy/grafana``. What the kernel knows of the process (``process_*``) is added by the endpoint.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shared_store.base.status import LATENCY_BOUNDS_S, Counters, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MODEL_STATES: Final = ("publishing", "committed")
_ROLES: Final = ("publisher", "reader", "waiting", "idle")


class StatusCollector(Collector):
    """The metrics of one snapshot."""

    def __init__(self, status: Status) -> None:
        """``status`` is what is exposed."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """All metric families."""
        yield from self._node()
        yield from self._devices()
        yield from self._models()
        for field in msgspec.structs.fields(Counters):
            name = f"wooly_{field.name}"
            text = f"{field.name.replace('_', ' ').capitalize()} since the store started."
            yield CounterMetricFamily(name, text, getattr(self._status.counters, field.name))
        yield self._requests()

    def _node(self) -> Iterator[Metric]:
        status = self._status
        yield _gauge("wooly_build_info", "The store's version.", ("version",), [((status.store.version,), 1)])
        yield _one("wooly_up", "1: the store answers.", 1)
        yield _one(
            "wooly_degraded", "1: it serves, but something beside it does not.", status.store.state == "degraded"
        )
        yield _one("wooly_uptime_seconds", "Since the store started.", status.store.uptime_s)
        yield _one("wooly_catalog_up", "1: the catalog's server takes what is written.", status.catalog.state == "ok")
        yield _one(
            "wooly_mapped_bytes", "Shared bytes that readers map, all readers added.", status.totals.mapped_bytes
        )
        yield _one(
            "wooly_saved_bytes",
            "Mapped bytes, less one copy of every distinct blob among them.",
            status.totals.saved_bytes,
        )
        yield _one(
            "wooly_private_bytes",
            "Bytes that readers say they hold for themselves: small tensors, and pages that they wrote to.",
            sum(client.private_bytes for client in status.clients),
        )

        if (keeper := status.keeper) is not None:
            yield _one("wooly_keeper_up", "1: a crash of the store loses nothing.", keeper.state == "ok")
            yield CounterMetricFamily("wooly_store_restarts", "Stores that the keeper had to replace.", keeper.restarts)

    def _devices(self) -> Iterator[Metric]:
        devices = self._status.devices
        yield _gauge(
            "wooly_resident_bytes",
            "Bytes that the store has allocated.",
            ("device",),
            [((device.id,), device.resident_bytes) for device in devices],
        )
        yield _gauge(
            "wooly_limit_bytes",
            "Most bytes that the store may allocate; absent: no limit.",
            ("device",),
            [((device.id,), device.limit_bytes) for device in devices if device.limit_bytes is not None],
        )
        yield _gauge(
            "wooly_segments",
            "Segments allocated.",
            ("device",),
            [((device.id,), device.segments) for device in devices],
        )
        yield _gauge(
            "wooly_dead_bytes",
            "Resident bytes that a blob had which is gone.",
            ("device",),
            [((device.id,), device.dead_bytes) for device in devices],
        )
        yield _gauge(
            "wooly_padding_bytes",
            "Resident bytes between blobs and at the ends of segments.",
            ("device",),
            [((device.id,), device.padding_bytes) for device in devices],
        )
        quarantined = Counter[str]()
        for held in self._status.quarantine:
            quarantined[held.device] += held.bytes
        yield _gauge(
            "wooly_quarantined_bytes",
            "Resident bytes of segments with wrong bytes, which their readers keep.",
            ("device",),
            [((device.id,), quarantined[device.id]) for device in devices],
        )

    def _models(self) -> Iterator[Metric]:
        models = self._status.models
        states = Counter[str](model.state for model in models)
        yield _gauge("wooly_models", "Models.", ("state",), [((state,), states[state]) for state in _MODEL_STATES])
        roles = Counter[str](client.role for client in self._status.clients)
        yield _gauge(
            "wooly_clients",
            "Clients; one that uses several models counts for each.",
            ("role",),
            [((role,), roles[role]) for role in _ROLES],
        )
        labels = ("key", "name")
        yield _gauge(
            "wooly_model_readers", "Readers of a model.", labels, [((one.key, one.name), one.readers) for one in models]
        )
        yield _gauge(
            "wooly_model_bytes",
            "Bytes of a model's tensors.",
            labels,
            [((one.key, one.name), one.bytes) for one in models],
        )
        yield _gauge(
            "wooly_model_unique_bytes",
            "Bytes of a model's blobs that no other model has: what removing it frees at most.",
            labels,
            [((one.key, one.name), one.unique_bytes) for one in models],
        )

    def _requests(self) -> Metric:
        family = HistogramMetricFamily(
            "wooly_request_duration_seconds",
            "Time that a client's request took, waiting for other clients included.",
            labels=("request",),
        )
        ends = [*(str(bound) for bound in LATENCY_BOUNDS_S), "+Inf"]
        for one in self._status.requests:
            family.add_metric((one.name,), list(zip(ends, accumulate(one.classes), strict=True)), one.total_s)
        return family


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
