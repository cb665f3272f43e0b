"""Parts of the benchmark ``compute`` with synthetic steps: ``steps``, ``steps_mps``, ``steps_equals``, and ``gate``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.harness.figures import Figures
from benchmarks.harness.processes import ChildError
from benchmarks.scenarios.compute_setup import HOLD_0, HOLD_2, PLAIN, START_TIMEOUT_S, WAYS, Fleet, Setup, Tenant, Way
from benchmarks.scenarios.compute_windows import Pair, cost, equals, requests, shares, stream

PASSES = 100_000
MANY = 8
GATE_ROUNDS = 5
GATE_TOKENS = 300


def steps(setup: Setup) -> Figures:
    """Let an important workload of short steps run beside a busy one of long steps, in all ways without MPS."""
    return _pairs(setup, (PLAIN, HOLD_0, HOLD_2))


def steps_mps(setup: Setup) -> Figures:
    """Do the same in the ways with MPS."""
    found = Figures()
    for way in (way for way in WAYS.values() if way.mps):
        one = _pairs(setup, (way,))
        found.numbers |= one.numbers
        found.raw |= one.raw
    return found


def _pairs(setup: Setup, ways: Iterable[Way]) -> Figures:
    """Measure a pair for each way, all in turn."""
    found = Figures()
    with contextlib.ExitStack() as stack:
        pieces = measured_pieces(setup)
        found.numbers |= {f"steps_{way.name}_pieces_{kind}": count for way in ways for kind, count in pieces.items()}
        pairs = {}
        for way in ways:
            fleet = stack.enter_context(setup.fleet(way))
            pairs[f"steps_{way.name}"] = Pair(
                fleet.steps("first", "decode", pieces, priority=0), fleet.steps("second", "prefill", pieces, priority=3)
            )
            fleet.start()
        alone = stream(found, pairs, setup.scale)
        requests(found, pairs, setup.scale, alone, setup.scale.step_requests_s)
    return found


def measured_pieces(setup: Setup) -> Mapping[str, int]:
    """Return the pieces of work of a step of each kind, measured while nothing else runs."""
    with setup.fleet(PLAIN) as fleet:
        tenant = fleet.steps("measured", "decode", {})
        fleet.start()
        wanted = {"decode": setup.scale.decode_s, "prefill": setup.scale.prefill_s}
        pieces: Mapping[str, int] = tenant.ask("calibrate", seconds=wanted)["pieces"]
        return pieces


def steps_equals(setup: Setup) -> Figures:
    """Let two and eight equals run without shares, with and without the arbiter; and two and eight with shares."""
    found = Figures()
    pieces = measured_pieces(setup)
    with setup.fleet(PLAIN) as plain, setup.fleet(HOLD_0) as gated:
        rows: dict[Way, list[Tenant]] = {}
        for fleet in (plain, gated):
            rows[fleet.way] = [fleet.steps(f"equal-{number}", "decode", pieces) for number in range(MANY)]
        longer = gated.steps("longer", "prefill", pieces)
        for fleet in (plain, gated):
            fleet.start()
        for label, count in (("two", 2), ("many", MANY)):
            equals(found, {f"steps_{label}_{way.name}": row[:count] for way, row in rows.items()}, setup.scale)
            put_ratios(found, f"steps_{label}")
        two = dict(zip(rows[HOLD_0], (75.0, 25.0), strict=False))
        shares(found, "steps_shares_two", gated, two)
        costs = [cost(tenant, setup.scale) for tenant in (rows[HOLD_0][0], longer)]
        shares(found, "steps_shares_unlike", gated, {rows[HOLD_0][0]: 75.0, longer: 25.0}, costs=costs)
        shares(found, "steps_shares_many", gated, dict.fromkeys(rows[HOLD_0], 100 / MANY))
    found.numbers["steps_many_workloads"] = MANY
    return found


def put_ratios(found: Figures, name: str) -> None:
    """Record times per token of equals with the arbiter over those without, window by window."""
    for figure in ("p50_ms", "p99_ms", "rate"):
        plain, gated = (found.raw[f"{name}_{way.name}_{figure}"] for way in (PLAIN, HOLD_0))
        ratio = figure.replace("_ms", "") + "_of_plain"
        found.put(f"{name}_{ratio}", [one / other for one, other in zip(gated, plain, strict=True)])


def gate(setup: Setup) -> Figures:
    """Measure the gate of a workload that is alone, and of one beside an idle workload."""
    found = Figures()
    with setup.fleet(HOLD_0) as fleet:
        tenant = fleet.steps("alone", "decode", {"decode": 1})
        fleet.start()
        alone = _passes(tenant)
        fleet.tenants.clear()  # the first one has started
        fleet.steps("idle", "decode", {"decode": 1})
        fleet.start()
        beside = _passes(tenant)
    found.put("gate_pass_alone_us", [1e6 * one for one in alone])
    found.put("gate_pass_beside_idle_us", [1e6 * one for one in beside])
    found.put("gate_of_synthetic_step", [one / setup.scale.decode_s for one in alone])
    with setup.fleet(HOLD_0) as fleet:
        engine = fleet.engine("alone", role="passes")
        engine.child.wait("imported", START_TIMEOUT_S)
        engine.child.ask("start", "ready", START_TIMEOUT_S)
        fleet.check_gated("alone")
        passed = _engine_passes(engine, fleet)
    found.put("gate_engine_step_ms", [1e3 * one["step_s"] for one in passed])
    found.put("gate_engine_us", [1e6 * one["gate_s"] for one in passed])
    found.put("gate_engine_calls", [one["calls"] for one in passed])
    found.put("gate_of_engine_step", [one["gate_s"] / one["step_s"] for one in passed])
    return found


def _passes(tenant: Tenant) -> Sequence[float]:
    return [tenant.ask("passes", count=PASSES)["pass_s"] for _ in range(GATE_ROUNDS)]


def _engine_passes(engine: Tenant, fleet: Fleet) -> Sequence[Mapping[str, float]]:
    tokens = min(GATE_TOKENS, fleet.setup.scale.max_len - 64)
    found = [engine.child.ask(json.dumps({"tokens": tokens}), "passed") for _ in range(GATE_ROUNDS + 1)]
    if not any(one["gate_s"] for one in found):
        raise ChildError("the engine did not pass its gate")
    return found[1:]
