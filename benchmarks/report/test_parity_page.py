"""The page of the parity matrix agrees with its results, and the check finds one that does not."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from benchmarks.harness.processes import command
from benchmarks.harness.results import RESULTS


def _page(*options: str) -> subprocess.CompletedProcess[str]:
    line = command("parity", "--markdown", *options)
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_committed_page_agrees_with_the_committed_results() -> None:
    """Fails if results were added without the page."""
    checked = _page("--check")
    assert checked.returncode == 0, checked.stderr


def test_changed_result_makes_the_page_stale_until_it_is_written_again(tmp_path: Path) -> None:
    """The check fails after one row has changed, and passes after the page was written."""
    results, page = tmp_path / "parity.json", tmp_path / "parity.md"
    shutil.copyfile(RESULTS / "parity.json", results)
    where = ("--output", str(results), "--page", str(page))
    assert _page(*where).returncode == 0
    assert _page(*where, "--check").returncode == 0
    changed = json.loads(results.read_text())
    changed["raw"][0] |= {"status": "differs", "reason": "answer 1 of the reader | is not stock's"}
    results.write_text(json.dumps(changed))
    stale = _page(*where, "--check")
    assert stale.returncode == 1
    assert "parity --markdown" in stale.stderr
    assert _page(*where).returncode == 0
    assert "| differs | answer 1 of the reader \\| is not stock's |" in page.read_text()
