"""Every command of ``python benchmarks`` imports, and describes its options."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from benchmarks.__main__ import COMMANDS, WORKERS, main
from benchmarks.harness.processes import BENCHMARKS


@pytest.mark.parametrize("name", COMMANDS)
def test_command_shows_its_help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as exited:
        main([name, "--help"])
    assert exited.value.code == 0
    shown = capsys.readouterr().out
    assert f"benchmarks {name}" in shown
    assert "options:" in shown


@pytest.mark.parametrize("module", WORKERS.values())
def test_worker_imports_without_an_engine(module: str) -> None:
    assert callable(importlib.import_module(module).main)


def test_list_names_all_commands() -> None:
    """The list is printed from any directory, also where Python does not add the script's folder to the path."""
    done = subprocess.run(
        [sys.executable, "-P", str(BENCHMARKS)], cwd="/", capture_output=True, text=True, timeout=60, check=True
    )
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_unknown_command_lists_the_valid_ones() -> None:
    with pytest.raises(SystemExit, match="unknown benchmark 'nothing'; valid names: demo, demo-overcommit"):
        main(["nothing"])
