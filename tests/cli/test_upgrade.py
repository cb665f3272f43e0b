"""`wooly upgrade` with a running store."""

from __future__ import annotations

import json
import sys

import shared_store

ONE = "a" * 64


def test_upgrade(wooly, actor):
    """It prints both versions and the duration, as text and as JSON. Models and keeper are the same as before."""
    assert wooly("serve", "--detach").returncode == 0
    actor().publish(key=ONE, model=[[1, 300_000]])
    before = json.loads(wooly("status", "--json").stdout)
    done = wooly("upgrade", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    after = json.loads(wooly("status", "--json").stdout)
    assert said["from"] == {"version": shared_store.__version__, "pid": before["store"]["pid"]}
    assert said["to"] == {"version": shared_store.__version__, "pid": after["store"]["pid"]}
    assert 0 < said["took_s"] < 60
    assert before["store"]["pid"] != after["store"]["pid"]
    assert before["keeper"]["pid"] == after["keeper"]["pid"]
    assert [model["key"] for model in after["models"]] == [ONE]
    again = wooly("upgrade", "--python", sys.executable)
    assert again.returncode == 0
    assert again.stdout.startswith(f"upgraded wooly {shared_store.__version__} (pid {after['store']['pid']}) to ")


def test_upgrade_to_a_missing_interpreter(wooly):
    """Exit code 18, one line with the reason, and the store continues."""
    assert wooly("serve", "--detach").returncode == 0
    pid = json.loads(wooly("status", "--json").stdout)["store"]["pid"]
    done = wooly("upgrade", "--python", "/nonexistent/python")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (18, "", 1)
    assert "/nonexistent/python" in done.stderr
    assert json.loads(wooly("status", "--json").stdout)["store"]["pid"] == pid


def test_upgrade_without_a_store(wooly):
    """Exit code 3, and no store is started."""
    done = wooly("upgrade")
    assert (done.returncode, done.stdout) == (3, "")
