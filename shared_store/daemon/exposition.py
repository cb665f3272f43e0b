"""A status as Prometheus metrics: one snapshot, one scrape, so that the numbers of a scrape belong together.

Names follow the status's own: ``wooly_`` and the field. Sizes are bytes, durations seconds.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared_store.status import Counters, Status

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

    def _devices(self) -> Iterator[Metric]:
        devices = self._status.devices
        yield _gauge(
            "wooly_resident_bytes",
            "Memory that the store has allocated.",
            ("device",),
            [((device.id,), device.resident_bytes) for device in devices],
        )
        yield _gauge(
            "wooly_limit_bytes",
            "Most that the store may allocate; absent: no limit.",
            ("device",),
            [((device.id,), device.limit_bytes) for device in devices if device.limit_bytes is not None],
        )
        yield _gauge(
            "wooly_segments", "Allocations.", ("device",), [((device.id,), device.segments) for device in devices]
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


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
