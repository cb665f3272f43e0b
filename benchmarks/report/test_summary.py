"""The summary agrees with the result files, and the check finds one that does not."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.harness.processes import command
from benchmarks.harness.results import RESULTS


def _summary(results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line = command("summary", "--results", str(results), *options)
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the results that a test may change."""
    return shutil.copytree(RESULTS, tmp_path / "results")


def test_committed_summary_agrees_with_the_committed_results() -> None:
    """Fails if results were added without the summary."""
    checked = _summary(RESULTS, "--check")
    assert checked.returncode == 0, checked.stderr


def test_changed_figure_makes_the_summary_stale_until_it_is_written_again(results: Path) -> None:
    """The check fails after one value of one file has changed, and passes after the summary was written."""
    measured = results / "h100" / "gpu.json"
    changed = json.loads(measured.read_text()) | {"attach_ms": 1.5}
    measured.write_text(json.dumps(changed))
    stale = _summary(results, "--check")
    assert stale.returncode == 1
    assert "run `python benchmarks summary`" in stale.stderr
    assert _summary(results).returncode == 0
    assert _summary(results, "--check").returncode == 0
    assert json.loads((results / "summary.json").read_text())["h100.attach_ms"] == 1.5


def test_keys_name_the_machine_and_medians_replace_their_values(tmp_path: Path) -> None:
    """A file outside of a folder is a machine of its own; raw values, versions and texts are excluded."""
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


def test_same_name_in_two_files_of_a_machine_is_an_error(tmp_path: Path) -> None:
    """Neither figure overwrites the other."""
    (tmp_path / "h100").mkdir()
    for file in ("one.json", "two.json"):
        (tmp_path / "h100" / file).write_text(json.dumps({"attach_ms": 1}))
    refused = _summary(tmp_path)
    assert refused.returncode != 0
    assert "h100.attach_ms" in refused.stderr
