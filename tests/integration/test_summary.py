"""The summary of the benchmarks' results says what the result files say, and shows when it no longer does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"


def _summary(results, *options):
    command = [sys.executable, str(BENCHMARKS / "summary.py"), "--results", str(results), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def results(tmp_path):
    """A copy of the results, to be changed."""
    return shutil.copytree(RESULTS, tmp_path / "results")


def test_committed_summary_is_of_the_committed_results():
    """Whoever adds results and not the summary learns it here."""
    checked = _summary(RESULTS, "--check")
    assert checked.returncode == 0, checked.stderr


def test_a_changed_figure_makes_it_stale_and_writing_it_makes_it_whole(results):
    """The check fails after one value of one file has changed, and passes once the summary is written again."""
    measured = results / "h100" / "gpu.json"
    changed = json.loads(measured.read_text()) | {"attach_ms": 1.5}
    measured.write_text(json.dumps(changed))
    stale = _summary(results, "--check")
    assert stale.returncode == 1
    assert "run `python benchmarks/summary.py`" in stale.stderr
    assert _summary(results).returncode == 0
    assert _summary(results, "--check").returncode == 0
    assert json.loads((results / "summary.json").read_text())["h100.attach_ms"] == 1.5


def test_keys_name_the_machine_and_medians_stand_for_their_values(tmp_path):
    """A file beside the folders is a machine's own; raw values, versions and texts are left out."""
    cpu = {
        "model": "tiny",
        "versions": {"cores": 2},
        "reader": {"load_s": {"median": 0.5, "all": [0.25, 0.5, 1.0]}},
        "ratios": {"decode_reader_to_stock": 1.01},
        "tokens_equal": True,
    }
    (tmp_path / "cpu.json").write_text(json.dumps(cpu))
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "gpu.json").write_text(json.dumps({"attach_ms": 20.5, "raw": {"attach_ms": [20.5]}}))
    assert _summary(tmp_path).returncode == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "cpu.decode_reader_to_stock": 1.01,
        "cpu.reader.load_s": 0.5,
        "cpu.tokens_equal": True,
        "h100.attach_ms": 20.5,
    }


def test_one_name_in_two_files_of_a_machine_is_refused(tmp_path):
    """Neither figure silently wins."""
    (tmp_path / "h100").mkdir()
    for file in ("one.json", "two.json"):
        (tmp_path / "h100" / file).write_text(json.dumps({"attach_ms": 1}))
    refused = _summary(tmp_path)
    assert refused.returncode != 0
    assert "h100.attach_ms" in refused.stderr
