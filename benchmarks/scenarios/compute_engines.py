"""Parts of the benchmark ``compute`` with vLLM engines: one for each way, ``engines_two`` and ``engines_many``."""

from __future__ import annotations

from benchmarks.harness.figures import Figures
from benchmarks.scenarios.compute_setup import HOLD_0, PLAIN, Setup, Way
from benchmarks.scenarios.compute_steps import put_ratios
from benchmarks.scenarios.compute_windows import Pair, equals, requests, shares, stream


def important(way: Way, setup: Setup) -> Figures:
    """Let an important engine answer one request after the other, then Poisson ones, beside a busy engine."""
    found = Figures()
    with setup.fleet(way) as fleet:
        pair = Pair(fleet.engine("first", priority=0), fleet.engine("second", priority=3))
        fleet.start()
        pairs = {f"engines_{way.name}": pair}
        alone = stream(found, pairs, setup.scale)
        requests(found, pairs, setup.scale, alone, setup.scale.requests_s)
    return found


def engines_two(setup: Setup) -> Figures:
    """Let two equal engines run, with and without the arbiter, and with shares of 75 and 25 percent."""
    found = Figures()
    batch = setup.scale.batch
    with setup.fleet(PLAIN) as plain, setup.fleet(HOLD_0) as gated:
        rows = {fleet.way: [fleet.engine(f"equal-{number}") for number in range(2)] for fleet in (plain, gated)}
        for fleet in (plain, gated):
            fleet.start()
        equals(found, {f"engines_two_{way.name}": row for way, row in rows.items()}, setup.scale, batch)
        put_ratios(found, "engines_two")
        two = dict(zip(rows[HOLD_0], (75.0, 25.0), strict=True))
        shares(found, "engines_shares_two", gated, two, batch=batch)
    return found


def engines_many(setup: Setup) -> Figures:
    """Let many equal engines run, without graphs, with and without the arbiter, and with equal shares."""
    found = Figures()
    batch = setup.scale.batch
    for way in (PLAIN, HOLD_0):  # both together may not fit
        with setup.fleet(way) as fleet:
            row = [fleet.engine(f"equal-{number}", enforce_eager=True) for number in range(setup.engines)]
            fleet.start()
            equals(found, {f"engines_many_{way.name}": row}, setup.scale, batch)
            if way.arbiter:
                shares(found, "engines_shares_many", fleet, dict.fromkeys(row, 100 / len(row)), batch=batch)
    put_ratios(found, "engines_many")
    found.numbers["engines_many_workloads"] = setup.engines
    return found
