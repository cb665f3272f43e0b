"""The commands about workloads, run as processes on a real store with clients that play workloads."""

from __future__ import annotations

import json
import os
import signal

import msgspec
import pytest
from support.plain_workload import MIB, PlainWorkload
from support.stepping import Stepping
from support.waiting import wait_until

from shared_store.base.errors import DeclinedError
from shared_store.base.workloads import Workloads

BUDGET = ("--budget", "cpu=1000MiB", "--vram-reserve", "100MiB", "--min-resident", "0", "--turn", "100ms")


@pytest.fixture
def store(wooly):
    """A store whose workloads may use 900 MiB of host memory together."""
    started = wooly("serve", "--detach", *BUDGET)
    assert started.returncode == 0, started.stderr


@pytest.fixture
def workload(directory, store):  # noqa: ARG001 - starts it
    """Return a function that makes a workload of 500 MiB, which joins."""
    made = []

    def make(name, *, resident=True, **options):
        one = PlainWorkload(directory, name, device="cpu", needs=500, stays=10, **options)
        made.append(one)
        one.join(refusal="" if options.get("swap", True) else "not today")
        if resident:
            one.enter()
        return one

    yield make
    for one in made:
        one.close()


def listed(wooly):
    """Return the workloads by name, as the command prints them."""
    done = wooly("workloads", "--json")
    assert done.returncode == 0, done.stderr
    return {one.name: one for one in msgspec.json.decode(done.stdout, type=Workloads).workloads}


def test_json_has_schema_states_and_memory(wooly, workload):
    workload("chat")
    workload("batch", resident=False, priority=3)
    assert json.loads(wooly("workloads", "--json").stdout)["schema"] == "wooly.workloads/1"
    found = listed(wooly)
    assert {name: (one.state, one.priority) for name, one in found.items()} == {
        "chat": ("resident", 0),
        "batch": ("swapped", 3),
    }
    (memory,) = found["chat"].memory
    assert (memory.device, memory.private, memory.stays, memory.needs) == ("cpu", 500 * MIB, 10 * MIB, 500 * MIB)


def test_table_has_accounts_workloads_and_reasons(wooly, workload):
    workload("chat", swap=False)
    workload("batch", resident=False, priority=3)
    shown = wooly("workloads").stdout
    accounts = next(line for line in shown.splitlines() if line.startswith("cpu"))
    assert accounts.split("  ")[0] == "cpu"
    assert "1000 MiB" in accounts
    assert "100 MiB" in accounts
    rows = {line.split()[0]: line for line in shown.splitlines() if " vllm " in line}
    assert "P3" in rows["batch"]
    assert "swapped" in rows["batch"]
    assert "490 MiB" in rows["batch"]  # what it lacks
    assert "chat is never swapped out: not today" in shown
    assert "chat is not held: it has not joined the arbiter" in shown
    assert "chat" in wooly("status").stdout


def test_a_store_without_workloads_says_what_to_do(wooly, store):  # noqa: ARG001 - starts it
    shown = wooly("workloads").stdout
    assert "no workloads" in shown
    assert "--load-format wooly" in shown


def test_watch_prints_a_line_for_each_refresh(background, workload):
    workload("chat")
    process = background("workloads", "--watch", "0.1", "--json")
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert [json.loads(line)["workloads"][0]["name"] for line in lines] == ["chat", "chat"]


def test_out_and_in_again(wooly, workload):
    """The command returns once the workload is there, and a workload that is there already is no error."""
    chat = workload("chat")
    for direction, state in (("out", "swapped"), ("out", "swapped"), ("in", "resident"), ("in", "resident")):
        done = wooly("swap", direction, "chat", "--wait")
        assert (done.returncode, done.stdout) == (0, f"swapped {direction}: chat\n"), done.stderr
        assert listed(wooly)["chat"].state == state
    assert len(chat.asked) == 1


def test_without_wait_it_returns_at_once(wooly, workload):
    workload("chat")
    done = wooly("swap", "out", "chat")
    assert (done.returncode, done.stdout) == (0, "asked to swap out: chat\n")
    wait_until(lambda: listed(wooly)["chat"].state == "swapped", "the workload to leave")


def test_a_workload_that_declines_is_exit_code_22(wooly, workload):
    chat = workload("chat")

    def decline(_request, _call):
        raise DeclinedError("a request came")

    chat.leave = decline
    done = wooly("swap", "out", "chat", "--wait")
    assert done.returncode == 22
    assert "a request came" in done.stderr
    assert listed(wooly)["chat"].refusals == 1


@pytest.mark.parametrize("command", ["swap out none", "priority none 2", "share none 50", "why none"])
def test_an_unknown_name_lists_the_names(wooly, workload, command):
    workload("chat")
    done = wooly(*command.split())
    assert (done.returncode, done.stdout) == (23, "")
    assert "chat" in done.stderr


def test_priority_is_set_until_the_workload_ends(wooly, workload):
    workload("chat")
    done = wooly("priority", "chat", "P2")
    assert (done.returncode, done.stdout) == (0, "chat has priority P2\n"), done.stderr
    assert listed(wooly)["chat"].priority == 2


def test_why_names_those_for_which_a_workload_is_held(wooly, directory, store):  # noqa: ARG001 - starts it
    """And the step that it suggests acts on the running workload."""
    with Stepping(directory, "chat") as chat, Stepping(directory, "batch", priority=3) as batch:
        wait_until(lambda: chat.attached and batch.attached, "both to have joined the arbiter")
        with chat.working(), batch.working():
            wait_until(lambda: listed(wooly)["batch"].compute.held, "the less important workload to be held")
            wait_until(lambda: listed(wooly)["chat"].compute.used_share > 0.01, "the time of the other to be counted")
            shown = wooly("workloads").stdout
            assert "resident, held" in shown
            assert "batch is held: `wooly why batch`" in shown
            done = wooly("why", "batch")
            assert "held while more important workloads work: chat (P0, " in done.stdout
            assert "`wooly priority batch 0`" in done.stdout
            assert json.loads(wooly("why", "batch", "--json").stdout)["blocked_by"] == ["chat"]
            before = batch.steps
            done = wooly("priority", "batch", "0")
            assert done.returncode == 0, done.stderr
            wait_until(lambda: batch.steps > before + 10, "it to make steps")
            wait_until(lambda: not listed(wooly)["batch"].compute.held, "its state to be shown")
        found = listed(wooly)
    assert found["batch"].compute.held_s > 0
    assert found["chat"].compute.device_s > 0


def test_a_share_is_set_until_the_workload_ends(wooly, workload):
    workload("chat", share=75.0)
    assert listed(wooly)["chat"].compute.share == 75.0
    for text, share, said in (("12.5%", 12.5, "chat has a share of 12.5%\n"), ("0", 0.0, "chat has an equal part\n")):
        done = wooly("share", "chat", text)
        assert (done.returncode, done.stdout) == (0, said), done.stderr
        assert listed(wooly)["chat"].compute.share == share


@pytest.mark.parametrize("wrong", ["101", "0.5", "-1", "half"])
def test_a_wrong_share_lists_the_right_ones(wooly, workload, wrong):
    workload("chat")
    done = wooly("share", "chat", "--", wrong)
    assert done.returncode == 2
    assert "a percentage from 1 to 100, or 0 for an equal part" in done.stderr


def test_without_an_arbiter_there_are_no_shares(wooly, directory):
    started = wooly("serve", "--detach", *BUDGET, "--no-arbiter")
    assert started.returncode == 0, started.stderr
    with PlainWorkload(directory, "chat", device="cpu", needs=10) as chat:
        chat.join()
        assert listed(wooly)["chat"].compute is None
        assert "HELD" not in wooly("workloads").stdout
        done = wooly("share", "chat", "50")
    assert done.returncode == 13
    assert "no arbiter" in done.stderr
    assert json.loads(wooly("status", "--json").stdout)["arbiter"] is None


def test_options_of_the_arbiter_reach_the_store(wooly):
    started = wooly("serve", "--detach", *BUDGET, "--max-hold", "2s")
    assert started.returncode == 0, started.stderr
    assert json.loads(wooly("status", "--json").stdout)["arbiter"]["max_hold_s"] == 2.0


@pytest.mark.parametrize("wrong", ["5", "-1", "high"])
def test_a_wrong_priority_lists_the_right_ones(wooly, workload, wrong):
    workload("chat")
    done = wooly("priority", "chat", "--", wrong)
    assert done.returncode == 2
    assert "0 (highest) to 4" in done.stderr


def test_why_names_those_that_have_the_memory(wooly, workload):
    workload("chat", swap=False)
    batch = workload("batch", resident=False)
    waiting = batch.entering()
    wait_until(lambda: listed(wooly)["batch"].blocked_by, "the wait to have a reason")
    assert listed(wooly)["batch"].blocked_by[0] == "chat"
    assert "wooly why batch" in wooly("workloads").stdout
    done = wooly("why", "batch")
    assert done.returncode == 0
    assert "chat" in done.stdout
    explained = json.loads(wooly("why", "batch", "--json").stdout)
    assert explained["blocked_by"][0] == "chat"
    assert len(explained["lines"]) == len(done.stdout.splitlines())  # the same, a moment later
    assert waiting.waits


def test_max_priority_bounds_what_a_user_claims(wooly, directory):
    started = wooly("serve", "--detach", *BUDGET, "--max-priority", f"{os.getuid()}=2")
    assert started.returncode == 0, started.stderr
    with PlainWorkload(directory, "chat", device="cpu", needs=10) as chat:
        assert chat.join() == ("chat", 2)


def test_names_are_completed(wooly, workload):
    """The shell's completion asks the running store."""
    workload("chat")
    workload("batch", resident=False)
    done = wooly(_WOOLY_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="wooly why c")
    assert "chat" in done.stdout
    assert "batch" not in done.stdout


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        ("--budget cpu", "--budget 'cpu' is not of the form DEVICE=SIZE, such as cpu=64GiB"),
        ("--budget cpu=lots", "--budget 'cpu=lots' is not of the form DEVICE=SIZE"),
        ("--vram-reserve 2GB", "--vram-reserve '2GB': use a size such as 2GiB, or 0"),
        ("--idle-after soon", "--idle-after 'soon': use a duration such as 300s, 30m or 2h"),
        ("--max-hold soon", "--max-hold 'soon': use a duration such as 300s, 30m or 2h"),
        ("--host-budget -1", "--host-budget '-1': use a size such as 2GiB, or 0"),
        ("--max-priority root=1", "--max-priority 'root=1' is not of the form UID=P, such as 1000=2"),
        ("--max-priority 1000=7", "--max-priority '1000=7': use 0 (highest) to 4"),
    ],
)
def test_wrong_options_of_serve_list_the_right_ones(wooly, options, listed):
    done = wooly("serve", *options.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert listed in done.stderr


def test_a_wrong_value_in_a_file_is_named_with_its_place(wooly, tmp_path):
    config = tmp_path / "config"
    config.write_text("WOOLY_TURN=later\n")
    done = wooly("serve", WOOLYAI_CLIENT_CONFIG=str(config))
    assert done.returncode == 2
    assert f"WOOLY_TURN='later' in {config}: use a duration" in done.stderr
