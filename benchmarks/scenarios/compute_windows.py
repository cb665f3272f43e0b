"""Windows of the benchmark ``compute``: an important workload beside a busy one, equals, and equals with shares.

Windows of different kinds, and of different ways to share the device, are measured in turn, so that a drift of the
machine is in all of them. Relies on ``workers/compute_steps.py`` and ``workers/compute_engine.py``, whose processes
answer the same commands.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.figures import Figures, percentile
from benchmarks.harness.processes import ChildError
from benchmarks.scenarios.compute_setup import Fleet, Scale, Tenant, arrivals, window

LOAD = 0.3
"""Fraction of time for which Poisson requests would keep the important workload busy, were it alone."""


@dataclass(frozen=True)
class Pair:
    """An important workload and a busy one that share a device."""

    first: Tenant
    second: Tenant


@dataclass(frozen=True)
class Alone:
    """What the workloads of a pair do a second, each alone."""

    first: float
    second: float


def stream(found: Figures, pairs: Mapping[str, Pair], scale: Scale) -> dict[str, Alone]:
    """Measure the tokens of the important workload, without pause, alone and beside the busy one.

    Puts, by the name of a pair: ``alone_p50_ms`` and ``p50_ms`` (also ``p99``): per token; ``p50_ratio``: beside the
    busy one over alone; ``first`` and ``second``: what each does by what it does alone; ``together``: their sum.
    """
    seconds = scale.window_s
    values: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in pairs}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    alone = {
        name: statistics.median(
            window(seconds, [(pair.second, "load", {})])[0]["count"] / seconds for _ in range(max(1, scale.rounds // 2))
        )
        for name, pair in pairs.items()
    }
    first: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(scale.rounds):
        for name, pair in pairs.items():
            (before,) = window(seconds, [(pair.first, "tokens", {})])
            during, load = window(seconds, [(pair.first, "tokens", {}), (pair.second, "load", {})])
            first[name].append(before["count"] / seconds)
            rates[name].append((during["count"] / before["count"], load["count"] / seconds / alone[name]))
            for percent in (50, 99):
                one, other = (_ms(name, answer["gaps"], percent) for answer in (before, during))
                values[name][f"alone_p{percent}_ms"].append(one)
                values[name][f"p{percent}_ms"].append(other)
                values[name][f"p{percent}_ratio"].append(other / one)
    for name in pairs:
        for figure, several in values[name].items():
            found.put(f"{name}_{figure}", several)
        _put_parts(found, name, rates[name])
    return {name: Alone(statistics.median(first[name]), alone[name]) for name in pairs}


def requests(
    found: Figures, pairs: Mapping[str, Pair], scale: Scale, alone: Mapping[str, Alone], seconds: float
) -> None:
    """Measure Poisson requests to the important workload, alone and beside the busy one.

    Puts, by the name of a pair, with ``requests`` after it, of windows of so many seconds: ``ttft_alone_p50_ms``,
    ``ttft_p50_ms`` (also ``p99``): from the arrival to the first token, of all windows together; ``p50_ms`` and so on:
    as :func:`stream`, of tokens but first ones; ``load``: fraction of time with a request while it was alone.
    """
    every: dict[str, dict[str, list[dict[str, Any]]]] = {name: {"alone": [], "beside": []} for name in pairs}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    pace = {name: LOAD / _request_s(pair.first) for name, pair in pairs.items()}
    for number in range(scale.rounds):
        for name, pair in pairs.items():
            trace = arrivals(pace[name], seconds, seed=number) or [0.0]
            (before,) = window(seconds, [(pair.first, "requests", {"arrivals": trace})])
            during, load = window(seconds, [(pair.first, "requests", {"arrivals": trace}), (pair.second, "load", {})])
            every[name]["alone"].append(before)
            every[name]["beside"].append(during)
            rates[name].append(
                (
                    during["count"] / seconds / alone[name].first,
                    load["count"] / seconds / alone[name].second,
                )
            )
    for name in pairs:
        put = f"{name}_requests"
        known: dict[str, float] = {}
        for kind, answers in every[name].items():
            label = "alone_" if kind == "alone" else ""
            for figure, source in (("ttft_", "first"), ("", "gaps")):
                values = [value for answer in answers for value in answer[source]]
                for percent in (50, 99):
                    known[f"{figure}{label}p{percent}"] = _ms(name, values, percent)
                if source == "first":
                    found.raw[f"{put}_ttft_{label}ms"] = [round(1e3 * value, 3) for value in sorted(values)]
        for percent in (50, 99):
            for figure in ("ttft_", ""):
                one, other = known[f"{figure}alone_p{percent}"], known[f"{figure}p{percent}"]
                found.numbers |= {
                    f"{put}_{figure}alone_p{percent}_ms": round(one, 4),
                    f"{put}_{figure}p{percent}_ms": round(other, 4),
                    f"{put}_{figure}p{percent}_ratio": round(other / one, 4),
                }
        found.put(f"{put}_load", [answer["busy_s"] / seconds for answer in every[name]["alone"]])
        found.numbers[f"{put}_answered"] = sum(len(answer["first"]) for answer in every[name]["beside"])
        _put_parts(found, put, rates[name])


def equals(found: Figures, rows: Mapping[str, Sequence[Tenant]], scale: Scale, batch: int | None = None) -> None:
    """Measure the tokens of equal workloads that all work. Puts ``p50_ms``, ``p99_ms`` and ``rate`` by the row's name.

    ``batch``: requests of each at the same time; None: as the workloads have it.
    """
    given = {} if batch is None else {"batch": batch}
    values: dict[str, list[float]] = defaultdict(list)
    for _ in range(scale.rounds):
        for name, tenants in rows.items():
            answers = window(scale.window_s, [(tenant, "tokens", given) for tenant in tenants])
            gaps = [gap for answer in answers for gap in answer["gaps"]]
            for percent in (50, 99):
                values[f"{name}_p{percent}_ms"].append(_ms(name, gaps, percent))
            values[f"{name}_rate"].append(sum(answer["count"] for answer in answers) / scale.window_s)
    for figure, several in values.items():
        found.put(figure, several)


def shares(
    found: Figures,
    name: str,
    fleet: Fleet,
    tenants: Mapping[Tenant, float],
    *,
    costs: Sequence[float] = (),
    batch: int | None = None,
) -> None:
    """Give running workloads their shares (percent, 100 in all), let all work, and compare what each got.

    Puts, by name: ``points``: the largest distance of a workload's part of the device's time from its share, in percent
    points; ``least``: the least part of its share that a workload got; ``account_points``: the distance by the
    arbiter's own account.

    Args:
        found: gets the figures.
        name: of the figures.
        fleet: of the workloads.
        tenants: the share of each.
        costs: seconds of a token of each alone; empty: equal ones.
        batch: requests of each at the same time; None: as the workloads have it.
    """
    scale = fleet.setup.scale
    given = {} if batch is None else {"batch": batch}
    wanted = list(tenants.values())
    for tenant, percent in tenants.items():
        fleet.set_share(tenant.child.name, percent)
    points, least, account, parts = [], [], [], []
    for _ in range(scale.share_rounds):
        before = _device_s(fleet, tenants)
        answers = window(scale.share_s, [(tenant, "tokens", given) for tenant in tenants])
        after = _device_s(fleet, tenants)
        used = [answer["count"] * cost for answer, cost in zip(answers, costs or [1.0] * len(answers), strict=True)]
        got = _percent(used)
        by_account = _percent([end - begin for begin, end in zip(before, after, strict=True)])
        parts.append([round(one, 2) for one in got])
        points.append(_distance(got, wanted))
        account.append(_distance(by_account, wanted))
        least.append(min(one / share for one, share in zip(got, wanted, strict=True)))
    found.put(f"{name}_points", points)
    found.put(f"{name}_least", least)
    found.put(f"{name}_account_points", account)
    found.raw[f"{name}_percent"] = parts
    for tenant in tenants:
        fleet.set_share(tenant.child.name, 0)


def cost(tenant: Tenant, scale: Scale) -> float:
    """Return the seconds of a token of a workload that is alone."""
    (answer,) = window(scale.window_s, [(tenant, "tokens", {})])
    return percentile(sorted(answer["gaps"]), 50)


def _device_s(fleet: Fleet, tenants: Mapping[Tenant, float]) -> list[float]:
    """Return the seconds of the device that each workload used so far, as the store has it."""
    found = []
    for tenant in tenants:
        status = fleet.row(tenant.child.name).compute
        found.append(0.0 if status is None else status.device_s)
    return found


def _percent(used: Sequence[float]) -> list[float]:
    total = sum(used)
    return [100 * one / total if total else 0.0 for one in used]


def _distance(got: Sequence[float], wanted: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(got, wanted, strict=True))


def _request_s(tenant: Tenant) -> float:
    """Return the seconds of a request to a workload that is alone."""
    answers = [window(0.0, [(tenant, "requests", {"arrivals": [0.0]})])[0] for _ in range(5)]
    return statistics.median(float(answer["busy_s"]) for answer in answers)


def _put_parts(found: Figures, name: str, rates: Sequence[tuple[float, float]]) -> None:
    found.put(f"{name}_first", [first for first, _ in rates])
    found.put(f"{name}_second", [second for _, second in rates])
    found.put(f"{name}_together", [first + second for first, second in rates])


def _ms(name: str, values: Sequence[float], percent: int) -> float:
    if not values:
        raise ChildError(f"{name}: no token came in a window")
    return 1e3 * percentile(sorted(values), percent)
