"""The commands, run as processes on running stores."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from support.waiting import process_state, wait_until

import shared_store
from shared_store.base.status import Status

ONE, OTHER = "a" * 63 + "1", "a" * 63 + "2"
NBYTES = 3 << 20


def gone(pid):
    return process_state(pid) in {"", "Z"}


def test_store_from_start_to_end(wooly, directory):
    """A detached store answers when `serve` returns, a second one is refused, and `stop` waits for both processes."""
    started = wooly("serve", "--detach")
    assert started.returncode == 0, started.stderr
    status = json.loads(wooly("status", "--json").stdout)
    pid, keeper = status["store"]["pid"], status["keeper"]["pid"]
    assert started.stdout == f"started a store (its keeper is pid {keeper}) in {directory}\n"
    second = wooly("serve", "--detach")
    assert (second.returncode, second.stdout) == (3, "")
    assert "a store is already running" in second.stderr
    assert second.stderr.endswith("[store_running]\n")
    stopped = wooly("stop")
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, f"stopped the store (pid {pid})\n", "")
    assert gone(pid)
    assert gone(keeper)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_foreground_store_ends_on_a_signal(background, wooly, directory, number):
    """Ctrl-C and SIGTERM end it with exit code 0 and without a traceback, and remove its socket."""
    process = background("serve")
    wait_until((directory / "store.sock").exists, "the store to listen")
    wait_until(lambda: wooly("status").returncode == 0, "the store to answer")
    process.send_signal(number)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert not (directory / "store.sock").exists()


@pytest.mark.parametrize("command", ["status", "models", "rm x", "pin x", "unpin x", "compact", "stop"])
def test_no_store(wooly, directory, command):
    """Exit code 3, nothing on stdout, one line with the next step, and no store is started."""
    done = wooly(*command.split())
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert ("nothing to stop" if command == "stop" else "wooly serve --detach") in done.stderr
    assert not (directory / "store.sock").exists()


def test_options_reach_the_store(wooly):
    """The store that `serve` starts has the limit and the number of clients."""
    assert wooly("serve", "--detach", "--max-resident", "cpu=1.5GiB", "--max-clients", "1").returncode == 0
    status = json.loads(wooly("status", "--json").stdout)
    assert status["devices"][0]["limit_bytes"] == 3 << 29


@pytest.mark.usefixtures("store")
def test_status_json(wooly, actor):
    """It decodes as a `Status`, and has all fields of the stable interface."""
    actor().publish(key=ONE, model=[[1, NBYTES]])
    text = wooly("status", "--json").stdout.removesuffix("\n")
    assert msgspec.json.encode(msgspec.json.decode(text, type=Status)).decode() == text
    found = json.loads(text)
    assert found["schema"] == "wooly.status/1"
    promised = {
        "node": {"id"},
        "store": {"pid", "uptime_s", "state"},
        "catalog": {"url", "state"},
        "devices": {"id", "resident_bytes", "limit_bytes"},
        "models": {"key", "name", "engine", "state", "tensors", "bytes", "unique_bytes", "readers", "pinned"},
        "clients": {"pid", "uid", "key", "role", "mapped_bytes", "private_bytes"},
        "totals": {"resident_bytes", "mapped_bytes", "saved_bytes"},
    }
    assert promised.keys() <= found.keys()
    for name, fields in promised.items():
        one = found[name][0] if isinstance(found[name], list) else found[name]
        assert fields <= one.keys(), name
    model = found["models"][0]
    assert (model["key"], model["bytes"], model["unique_bytes"], model["readers"]) == (ONE, NBYTES, NBYTES, 1)


@pytest.mark.usefixtures("store")
def test_status_table(wooly, actor):
    """Formatted sizes, the model and its two readers by name, without the command itself."""
    actor(name="first").publish(key=ONE, model=[[1, NBYTES]])
    actor(name="second").publish(key=ONE, model=[[1, NBYTES]])
    shown = wooly("status").stdout
    lines = [line.split() for line in shown.splitlines()]
    sizes = ["3.00", "MiB", "3.00", "MiB", "3.00", "MiB", "0", "B", "0", "B"]  # size, unique, resident, host, disk
    assert ["aaaaaaaaaaaa", "model", "test", "cpu", "committed", "1", *sizes, "2", "0", "no"] in lines
    assert sum(line[2:5] == ["first", "reader", "model"] for line in lines) == 1
    assert sum(line[2:5] == ["second", "reader", "model"] for line in lines) == 1
    assert "idle" not in shown
    assert ", 3.00 MiB saved" in shown


@pytest.mark.usefixtures("store")
def test_output_in_a_pipe_is_plain(wooly, actor):
    """No escape codes, even if the environment requests colours or a name contains some, and no folded lines."""
    actor(name="\x1b[31mred" + "x" * 150).publish(key=ONE, model=[[1, 1000]])
    shown = wooly("status", FORCE_COLOR="1", COLUMNS="40").stdout
    assert "\x1b" not in shown
    assert r"\x1b[31mred" + "x" * 150 in shown


@pytest.mark.usefixtures("store")
def test_models_and_rm(wooly, actor):
    """Models are listed as table and JSON. An idle one is removed by an unambiguous prefix of its key."""
    assert wooly("models", "--json").stdout == "[]\n"
    assert "the store has no models" in wooly("models").stdout
    client = actor()
    client.publish(key=ONE, model=[[1, 1000]])
    client.leave(key=ONE)
    client.publish(key=OTHER, model=[[2, 1000]])
    assert [model["key"] for model in json.loads(wooly("models", "--json").stdout)] == [ONE, OTHER]
    assert [line.split()[0] for line in wooly("models").stdout.splitlines()] == ["KEY", ONE[:12], OTHER[:12]]

    unknown, ambiguous, in_use = wooly("rm", "f"), wooly("rm", "aaaa"), wooly("rm", OTHER)
    assert (unknown.returncode, in_use.returncode) == (9, 10)
    assert ambiguous.returncode != 0
    assert unknown.stderr.endswith("[model_not_found]\n")
    assert in_use.stderr.endswith("[model_in_use]\n")

    assert wooly("rm", ONE).stdout == f"removed {ONE}\n"
    client.leave(key=OTHER)
    assert wooly("rm", "aaa").stdout == f"removed {OTHER}\n"
    assert wooly("models", "--json").stdout == "[]\n"


@pytest.mark.usefixtures("store")
def test_pin_and_unpin(wooly, actor):
    """By an unambiguous prefix of the key. Table and JSON show the pin."""
    client = actor()
    client.publish(key=ONE, model=[[1, 1000]])
    client.publish(key=OTHER, model=[[2, 1000]])
    assert wooly("pin", "aaaa").returncode != 0
    assert wooly("pin", "f").stderr.endswith("[model_not_found]\n")
    assert wooly("pin", ONE).stdout == f"pinned {ONE}\n"
    models = json.loads(wooly("models", "--json").stdout)
    assert [(model["pinned"], model["last_used"] > 1e9) for model in models] == [(True, True), (False, True)]
    assert [line.split()[-1] for line in wooly("models").stdout.splitlines()] == ["PINNED", "yes", "no"]
    assert wooly("unpin", ONE).stdout == f"unpinned {ONE}\n"
    assert {line.split()[-1] for line in wooly("models").stdout.splitlines()[1:]} == {"no"}


def test_compact(wooly, start_store, actor):
    """Table and JSON show freed bytes; a second run frees nothing. The status has dead bytes before, none after."""
    start_store(compact_share=1.0)
    client = actor()
    client.publish(key=ONE, model=[[1, 4 << 20], [2, 1000]])
    client.leave(key=ONE)
    client.publish(key=OTHER, model=[[2, 1000]])
    client.leave(key=OTHER)
    client.remove(key=ONE)
    assert json.loads(wooly("status", "--json").stdout)["devices"][0]["dead_bytes"] == 4 << 20
    assert "DEAD" in wooly("status").stdout
    done = wooly("compact", "--json")
    assert json.loads(done.stdout) == [{"device": "cpu", "segments": 1, "moved_bytes": 1000, "freed_bytes": 4 << 20}]
    assert json.loads(wooly("status", "--json").stdout)["devices"][0]["dead_bytes"] == 0
    shown = wooly("compact", "--device", "cpu").stdout.splitlines()
    assert shown[1].split() == ["cpu", "0", "0", "B", "0", "B"]
    unknown = wooly("compact", "--device", "tpu")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.endswith("[unknown_device]\n")


@pytest.mark.usefixtures("store")
def test_watch_as_json(background):
    """One line for each refresh, until Ctrl-C, with exit code 0."""
    process = background("status", "--watch", "0.1", "--json")
    uptimes = [json.loads(process.stdout.readline())["store"]["uptime_s"] for _ in range(3)]
    assert uptimes == sorted(set(uptimes))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.usefixtures("store")
def test_watch_on_a_terminal(background):
    """On a terminal it redraws an alternate screen, and Ctrl-C restores the screen and the cursor."""
    controller, terminal = pty.openpty()
    try:
        environment = {**os.environ, "TERM": "xterm"}
        process = background("status", "--watch", stdout=terminal, env=environment)
        shown = b""
        while b"catalog" not in shown:
            assert select.select([controller], [], [], 20)[0], shown
            shown += os.read(controller, 1 << 16)
        assert b"\x1b[?1049h" in shown
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        os.close(terminal)
        terminal = -1
        with contextlib.suppress(OSError):  # the end of a terminal is an error in the kernel's terms
            while data := os.read(controller, 1 << 16):
                shown += data
        assert shown.rfind(b"\x1b[?1049l") > shown.rfind(b"\x1b[?1049h")
        assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")
        assert process.stderr.read() == ""
    finally:
        os.close(controller)
        if terminal >= 0:
            os.close(terminal)


def test_watch_ends_with_the_store(background, store):
    """The end of the store ends a watch with exit code 3 and one line on stderr."""
    process = background("status", "--watch", "0.1", "--json")
    assert process.stdout.readline()
    store.kill()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 3
    assert errors.endswith("[store_unavailable]\n")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("serve --metrics 9400", "--metrics '9400' is not of the form HOST:PORT"),
        ("serve --detach --metrics host:x", "--metrics 'host:x' is not of the form HOST:PORT"),
        ("serve --max-resident cpu", "--max-resident 'cpu' is not of the form DEVICE=SIZE"),
        ("serve --detach --max-resident tpu=1GiB", "[unknown_device]"),
        ("serve --log-level loud", "--log-level 'loud': use one of DEBUG, INFO, WARNING, ERROR"),
        ("serve --group no-such-group", "there is no group 'no-such-group'"),
        ("serve --max-clients 0", "--max-clients"),
        ("status 3", "SECONDS goes with --watch"),
        ("status --watch 0", "0.1"),
        ("status --wtach", "No such option"),
        ("statsu", "No such command 'statsu'"),
    ],
)
def test_misuse(wooly, directory, arguments, says):
    """Exit code 2, the reason, no traceback, and no store is started."""
    done = wooly(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (directory / "store.sock").exists()


def test_unusable_environment_names_the_variable(wooly):
    """An invalid value is an error that names the variable."""
    done = wooly("serve", WOOLY_LOG_LEVEL="loud")
    assert done.returncode == 2
    assert "WOOLY_LOG_LEVEL='loud'" in done.stderr


def test_version(wooly):
    """The command and the option print the same."""
    assert wooly("--version").stdout == wooly("version").stdout == f"wooly {shared_store.__version__}\n"


def test_help_is_light():
    """`--help` imports no module that is slow to import."""
    program = (
        "import sys\nfrom shared_store.cli import app\n"
        "try: app(['--help'], prog_name='wooly')\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'redis', 'rich', 'prometheus_client', 'asyncio', 'http.server', 'msgspec'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_completion(wooly):
    """The shell's completion lists the commands."""
    done = wooly(_WOOLY_COMPLETE="complete_bash", COMP_WORDS="wooly st", COMP_CWORD="1")
    assert done.stdout.split() == ["stop", "status"]


def test_script_is_installed():
    """The `wooly` script of the package is this command."""
    script = Path(sys.executable).parent / "wooly"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"wooly {shared_store.__version__}\n"
