"""Figures in the README and on pages are those of the result files, rounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = {"MiB": 1 << 20, "GB": 1e9, "ms": 1e-3, "k": 1e3}


class Results(dict):
    """`summary.json` for `str.format`: `s[KEY]`, and `s[KEY/UNIT]` for the value in another unit."""

    def __missing__(self, key):
        name, _, unit = key.partition("/")
        return self[name] / UNITS[unit]


S = Results(json.loads((ROOT / "benchmarks" / "results" / "summary.json").read_text()))


def expected():
    """Yield pages and texts of `figures.txt`."""
    page = None
    for line in (Path(__file__).parent / "figures.txt").read_text().splitlines():
        if line.startswith("# "):
            page = line.removeprefix("# ")
        elif page and line:
            yield page, line


@pytest.mark.parametrize(("page", "text"), list(expected()))
def test_a_figure_is_the_measured_one(page, text):
    """The text that the results make is on the page."""
    assert text.format(s=S) in " ".join((ROOT / page).read_text().split())


def test_every_figure_of_the_readmes_table_is_compared():
    """A row with a digit in the table of measurements is in `figures.txt`."""
    table = (ROOT / "README.md").read_text().partition("## Measured")[2].partition("\n\n##")[0]
    rows = [
        line.split(" | ")[0].strip("| ") for line in table.splitlines() if line.startswith("| ") and "---" not in line
    ]
    compared = " ".join(text for page, text in expected() if page == "README.md")
    assert [row for row in rows[1:] if row not in compared and row != "greedy tokens"] == []
