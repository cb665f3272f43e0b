"""The check for leaked descriptors finds a planted leak, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import descriptors
from support.descriptors import no_leak_in, steady

TESTS = Path(__file__).parents[1]

PROGRAM = """
import gc, os, threading
import pytest
from support import descriptors

descriptors.PATIENCE_S = 1.0
kept = []

class Owner:
    def __init__(self, fd):
        self.fd = fd
    def __del__(self):
        os.close(self.fd)

@pytest.fixture
def opened():
    with open('/dev/null') as file:
        yield file

@pytest.fixture
def leaking():
    kept.append(os.dup(0))

@pytest.fixture
def owner():
    return Owner(os.dup(0))

@pytest.fixture(scope='module')
def module_file():
    with open('/dev/null') as file:
        yield file

@pytest.fixture(scope='session')
def session_file():
    with open('/dev/null') as file:
        yield file

@pytest.fixture(scope='session')
def spare():
    return os.open('/dev/null', os.O_RDONLY)
"""

LEAKS = {
    "pipe": "kept.append(os.pipe())",
    "duplicate": "kept.append(os.dup(0))",
    "file": "kept.append(open('/dev/null'))",
    "memory_file": "kept.append(os.memfd_create('wooly'))",
    "number_that_another_file_took": (
        "spare = request.getfixturevalue('spare'); os.close(spare); assert os.open('/dev/zero', os.O_RDONLY) == spare"
    ),
    "fixture_that_leaks": "request.getfixturevalue('leaking')",
}
HARMLESS = {
    "closed_in_the_test": "os.close(os.dup(0))",
    "closed_by_a_fixture": "request.getfixturevalue('opened')",
    "closed_by_a_thread_a_moment_later": "threading.Timer(0.2, os.close, [os.dup(0)]).start()",
    "owned_by_garbage_in_a_cycle": "gc.disable(); cycle = [Owner(os.dup(0))]; cycle.append(cycle)",
    "owned_by_the_value_of_a_fixture": "assert owner",
    "of_a_fixture_of_the_module": "request.getfixturevalue('module_file')",
    "of_a_fixture_of_the_session": "request.getfixturevalue('session_file')",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run tests with the check, as the suite does; the lines of outcome by the test's name."""
    directory = tmp_path_factory.mktemp("checked")
    (directory / "conftest.py").write_text('pytest_plugins = ["support.descriptors"]\n')
    tests = [f"def test_{name}(request, owner):\n    {body}\n" for name, body in {**LEAKS, **HARMLESS}.items()]
    (directory / "test_it.py").write_text("\n".join([PROGRAM, *tests]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--rootdir", directory, directory],
        env={
            **os.environ,
            "COLUMNS": "300",  # the summary cuts lines at the width of the terminal
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        },
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith(("PASSED ", "ERROR ", "FAILED ")):
            outcome, where = line.split(maxsplit=2)[:2]
            found.setdefault(where.partition("::test_")[2], {})[outcome] = line
    return found


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_fails_its_test(outcomes, leak):
    """In the teardown: the test itself passed."""
    assert outcomes[leak].keys() == {"PASSED", "ERROR"}
    assert "descriptors were leaked: {" in outcomes[leak]["ERROR"]


@pytest.mark.parametrize("use", HARMLESS)
def test_other_tests_pass(outcomes, use):
    assert outcomes[use].keys() == {"PASSED"}, outcomes[use]


@pytest.fixture
def child():
    """A process that runs a line of Python for each line that it reads."""
    program = "import os, sys\nfor line in sys.stdin:\n    exec(line)\n    print(flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(line):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        process.stdout.readline()

    run.pid = process.pid
    with process:
        run("pass")
        yield run
        process.stdin.close()


def test_a_leak_in_another_process_is_found(child, monkeypatch):
    monkeypatch.setattr(descriptors, "PATIENCE_S", 0.5)
    block = no_leak_in(child.pid)
    with pytest.raises(AssertionError, match=r"other descriptors than before: .*pipe:\[N\]': 2"), block:
        child("kept = os.pipe()")


def test_a_process_that_lost_a_descriptor_is_found(child, monkeypatch):
    monkeypatch.setattr(descriptors, "PATIENCE_S", 0.5)
    child("kept = os.dup(1)")
    block = no_leak_in(child.pid)
    with pytest.raises(AssertionError, match=r"other descriptors than before: .*pipe:\[N\]': -1"), block:
        child("os.close(kept)")


def test_a_process_that_closes_what_it_opens_passes(child):
    before = steady(child.pid)
    with no_leak_in(child.pid):
        child("[os.close(os.dup(0)) for _ in range(100)]")
        child("import threading; threading.Timer(0.3, os.close, [os.dup(0)]).start()")
    assert steady(child.pid) == before
