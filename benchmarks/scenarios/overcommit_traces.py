"""GPUs with more workloads than memory, and requests for them, for the simulated node. Equal seeds give equal traces.

Costs are measurements of one H100 with vLLM 0.26 (``docs/decisions/0023-overcommit-policy.md`` lists them). How often
requests come, how long they take, and how large workloads are is assumed, and stated here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from support.overcommit_world import Arrival, Engine

GIB = 1 << 30

CAPACITY = 76 * GIB
"""An 80 GB card's usable memory less the reserve."""

DRAIN_S, UNMAP_S, MAP_S, ZERO_S = 0.004, 0.070, 0.011, 0.011
COPY_OUT, COPY_IN, WEIGHTS_IN = 52e9, 47e9, 24.5e9
"""Bytes per second."""

STAYS = int(1.7 * GIB)
"""What an engine keeps when it is away."""

RESTORE_S = 0.55
"""A return from the deep tier takes so much longer; there an engine keeps nothing."""

DEEP_FROM = 17
"""With so many workloads on a GPU they leave to the deep tier: what they would keep does not fit."""

USED = 0.1
"""Share of the KV cache in use, which is copied."""

COUNTS = (4, 8, 16, 32, 64)
PRIORITIES = (0, 0, 1, 1, 1, 2, 2, 2, 3, 4)
SHARED_BY = 3
"""Engines of one model, on average."""

BATCH_FROM = 3
BATCH_S, BATCH_EVERY_S = 60.0, 300.0
"""Workloads of these priorities and lower have long requests in addition."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of the fleet.

    Attributes:
        count: its workloads.
        kind: of its requests, ``bursty`` or ``heavy_tailed``.
        all_p0: all of its workloads are P0.
        load: seconds of work that arrive each second, each request alone.
        engines: name, priority, private bytes, model.
        models: bytes by name.
        arrivals: in order of time.
    """

    count: int
    kind: str
    all_p0: bool
    load: float
    engines: tuple[tuple[str, int, int, str], ...]
    models: dict[str, int]
    arrivals: tuple[Arrival, ...]


def gpu(seed: int, seconds: float) -> Gpu:
    """Return the GPU of a seed, and its requests for some seconds."""
    chance = random.Random(seed)
    count = COUNTS[seed % len(COUNTS)]
    kind = "bursty" if seed // len(COUNTS) % 2 else "heavy_tailed"
    all_p0 = seed // (2 * len(COUNTS)) % 8 == 0
    room = CAPACITY - (0 if count >= DEEP_FROM else count * STAYS)
    over = chance.choice((1.5, 2.0, 3.0, 4.0) if count < DEEP_FROM else (2.0, 3.0, 4.0, 8.0))
    names = [f"model-{number}" for number in range(max(2, count // SHARED_BY))]
    weights = {name: chance.choice((2.0, 5.0, 9.0, 16.0, 30.0)) for name in names}
    shapes = [(chance.choice(names), chance.choice((2.0, 4.0, 8.0, 16.0))) for _ in range(count)]
    factor = over * room / (sum(weights[name] for name, _ in shapes) + sum(kv for _, kv in shapes))
    factor = min(factor, 0.6 * room / max(weights[name] + kv for name, kv in shapes))
    engines = tuple(
        (f"engine-{number}", 0 if all_p0 else chance.choice(PRIORITIES), int(kv * factor), name)
        for number, (name, kv) in enumerate(shapes)
    )
    load = chance.choice((0.2, 0.4, 0.6, 0.8))
    arrivals = _arrivals(chance, kind, [one[0] for one in engines], load, seconds)
    for name, priority, _, _ in engines:
        if priority >= BATCH_FROM:
            arrivals += _batches(chance, name, seconds)
    arrivals.sort(key=lambda one: one.at)
    models = {name: int(nbytes * factor) for name, nbytes in weights.items()}
    return Gpu(count, kind, all_p0, load, engines, models, tuple(arrivals))


def _arrivals(chance: random.Random, kind: str, names: list[str], load: float, seconds: float) -> list[Arrival]:
    """Return requests: a few engines have most of them (Zipf), and take 3 s in the mean."""
    shares = [1 / (place + 1) for place in range(len(names))]
    chance.shuffle(shares)
    mean_s = 3.0
    found: list[Arrival] = []
    for name, share in zip(names, shares, strict=True):
        rate = load / mean_s * share / sum(shares)
        times = _bursts(chance, rate, seconds) if kind == "bursty" else _pareto(chance, rate, seconds)
        for at in times:
            whole = (
                min(60.0, chance.lognormvariate(0.6, 1.0)) if kind == "heavy_tailed" else chance.expovariate(1 / mean_s)
            )
            found.append(Arrival(at, name, min(whole, chance.uniform(0.03, 0.3)), whole))
    return found


def _batches(chance: random.Random, name: str, seconds: float) -> list[Arrival]:
    """Return long requests, now and then."""
    found: list[Arrival] = []
    at = chance.expovariate(1 / BATCH_EVERY_S)
    while at < seconds:
        whole = chance.expovariate(1 / BATCH_S)
        found.append(Arrival(at, name, min(whole, 0.3), whole))
        at += chance.expovariate(1 / BATCH_EVERY_S)
    return found


def _bursts(chance: random.Random, rate: float, seconds: float) -> list[float]:
    """Return times of a Poisson process that is on for a fifth of the time, for 15 s in the mean."""
    found: list[float] = []
    at = chance.uniform(-60, 15)
    while at < seconds:
        end = at + chance.expovariate(1 / 15)
        while (at := at + chance.expovariate(5 * rate)) < min(end, seconds):
            if at >= 0:
                found.append(at)
        at = end + chance.expovariate(1 / 60)
    return found


def _pareto(chance: random.Random, rate: float, seconds: float) -> list[float]:
    """Return times whose distances have a Pareto distribution with exponent 1.5."""
    shape = 1.5
    least = (shape - 1) / (shape * rate)
    found: list[float] = []
    at = chance.uniform(0, 1 / rate)
    while at < seconds:
        found.append(at)
        at += least * chance.paretovariate(shape)
    return found


def engines_of(found: Gpu, *, shared: bool) -> tuple[int, list[Engine], dict[str, tuple[int, float]]]:
    """Return bytes of the device, and engines and models as the simulated node takes them.

    Args:
        found: the GPU.
        shared: engines of one model share its weights. If not, each has its own.
    """
    deep = found.count >= DEEP_FROM
    made = []
    for name, priority, kv, model in found.engines:
        used = USED * kv
        own = 0 if shared else found.models[model]
        out_s = DRAIN_S + UNMAP_S + used / COPY_OUT
        in_s = MAP_S + ZERO_S + used / COPY_IN + own / WEIGHTS_IN + (RESTORE_S if deep else 0.0)
        made.append(Engine(name, priority, kv + own, out_s, in_s, model if shared else "", 0 if deep else STAYS))
    models = {name: (nbytes, nbytes / WEIGHTS_IN) for name, nbytes in found.models.items()}
    return CAPACITY, made, models if shared else {}
