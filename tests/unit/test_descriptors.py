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

HEAD = """
import gc, os, threading, time
import pytest
from support import descriptors
descriptors.PATIENCE_S = 0.5
kept = []
"""


@pytest.fixture
def outcome(tmp_path):
    """Run a test file with the check, as the suite does; how many tests passed and failed, and the output."""

    def run(body):
        (tmp_path / "conftest.py").write_text('pytest_plugins = ["support.descriptors"]\n')
        (tmp_path / "test_it.py").write_text(HEAD + body)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout.strip().splitlines()[-1].partition(" in ")[0], done.stdout

    return run


LEAKS = {
    "pipe": "kept.append(os.pipe())",
    "duplicate": "kept.append(os.dup(0))",
    "file": "kept.append(open('/dev/null'))",
    "memory file": "kept.append(os.memfd_create('wooly'))",
    "number that was taken by another file": "os.close(spare); assert os.open('/dev/zero', os.O_RDONLY) == spare",
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_fails_its_test_and_no_other(outcome, leak):
    found, output = outcome(f"""
spare = os.open('/dev/null', os.O_RDONLY)

def test_before(): pass
def test_leak(): {LEAKS[leak]}
def test_after(): pass
""")
    assert found == "3 passed, 1 error"
    assert "ERROR at teardown of test_leak" in output
    assert "descriptors were leaked: {" in output


def test_a_fixture_that_leaks_fails_its_test(outcome):
    found, output = outcome("""
@pytest.fixture
def leaking():
    kept.append(os.dup(0))
    yield

def test_leak(leaking): pass
""")
    assert found == "1 passed, 1 error"
    assert "descriptors were leaked: {" in output


HARMLESS = {
    "closed in the test": "os.close(os.dup(0))",
    "closed by a fixture": "assert opened",
    "closed by a thread a moment later": """
    fd = os.dup(0)
    threading.Timer(0.2, os.close, [fd]).start()""",
    "owned by a cycle that is garbage": """
    gc.disable()
    cycle = [Owner(os.dup(0))]
    cycle.append(cycle)""",
    "of a fixture of the module, made before the test": "assert module_file",
    "of a fixture of the session, made in the test": "request.getfixturevalue('session_file')",
}


@pytest.mark.parametrize("use", HARMLESS)
def test_what_is_no_leak_passes(outcome, use):
    found, output = outcome(f"""
class Owner:
    def __init__(self, fd):
        self.fd = fd
    def __del__(self):
        os.close(self.fd)

@pytest.fixture
def opened():
    with open('/dev/null') as file:
        yield file

@pytest.fixture(scope='module')
def module_file():
    with open('/dev/null') as file:
        yield file

@pytest.fixture(scope='session')
def session_file():
    with open('/dev/null') as file:
        yield file

def test_it(request{", opened" if "by a fixture" in use else ""}{", module_file" if "module" in use else ""}):
    {HARMLESS[use]}
def test_after(): pass
""")
    assert found == "2 passed", output


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
