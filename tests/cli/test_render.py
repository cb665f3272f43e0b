"""Formatted sizes, durations and names, and parsed sizes."""

from __future__ import annotations

import msgspec
import pytest

from shared_store.base.errors import ConfigError
from shared_store.base.sizes import parse_size
from shared_store.base.status import ActivityStatus, ClientStatus
from shared_store.base.workloads import ComputeStatus, WorkloadMemory, WorkloadStatus
from shared_store.cli import render, views, workload_views
from shared_store.cli.overcommit_options import size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (15 << 20, "15.0 MiB"),
        (3 << 29, "1.50 GiB"),
        (700 << 30, "700 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_size(nbytes, text):
    """Binary units up to TiB, with three digits."""
    assert render.size(nbytes) == text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1048576", 1 << 20), ("64GiB", 64 << 30), ("1.5 TiB", 3 << 39), ("2g", 2 << 30), ("10 kib", 10240), ("7B", 7)],
)
def test_parse_size(text, nbytes):
    """Valid sizes."""
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "64GB", "64 gigabytes", "1,5GiB", "0", "0GiB", "inf", "٣"])
def test_parse_size_refuses(text):
    """Decimal units, zero and other digits are refused."""
    assert parse_size(text) is None


@pytest.mark.parametrize("text", ["", "cpu", "cpu=", "=1GiB", "cpu=much", "cpu 1GiB"])
def test_limit_names_option_and_form(text):
    """Another form is refused with the option's name and the valid form."""
    with pytest.raises(ConfigError, match=r"--max-resident .* DEVICE=SIZE, such as cpu=64GiB"):
        size("--max-resident", text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (93784.5, "1 d 2 h"), (864000, "10 d 0 h")],
)
def test_duration(seconds, text):
    """The two largest units are shown."""
    assert render.duration(seconds) == text


def test_control_characters_are_replaced():
    """Escapes, line ends and direction marks in a client's name are shown as question marks."""
    assert render.plain("a\x1b[31mb\nc\u202ed") == "a?[31mb?c?d"


@pytest.mark.parametrize(
    ("activity", "shown"),
    [
        (None, "-"),
        (ActivityStatus(busy=True, idle_s=0.1, running=3, waiting=1), "busy, 3 running, 1 waiting"),
        (ActivityStatus(busy=False, idle_s=None, running=0, waiting=0), "idle"),
        (ActivityStatus(busy=False, idle_s=3 * 3600 + 65, running=0, waiting=0), "idle for 3 h 1 min"),
    ],
)
def test_activity_of_a_client(activity, shown):
    assert views.activity(activity) == shown


@pytest.mark.parametrize(
    ("described", "shown"),
    [
        ({}, "0"),
        ({"pid_known": False}, "unknown"),
        ({"pid_known": False, "pod": "llama-0"}, "llama-0"),
        (
            {"pid_known": False, "namespace": "serving", "pod": "llama-0", "container": "engine"},
            "serving/llama-0/engine",
        ),
    ],
)
def test_process_of_a_client(described, shown):
    assert views.process(ClientStatus(1, 0, 0, "", "", "idle", 0, 0, **described)) == shown


WORKLOAD = WorkloadStatus("chat", "vllm", 7, 1000, 0, "swapped", (WorkloadMemory("cpu", 10, 5, 10, 90),))


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, "-"),
        ({"idle_s": 75.0}, "idle 1 min 15 s"),
        ({"idle_s": 75.0, "waiting": 2}, "0 run, 2 wait"),
        ({"busy": True, "running": 1}, "1 run, 0 wait"),
    ],
)
def test_activity_of_a_workload(changed, shown):
    assert workload_views.activity(msgspec.structs.replace(WORKLOAD, **changed)) == shown


def test_memory_of_a_workload_and_what_it_lacks():
    assert workload_views.totals(WORKLOAD) == (10, 5, 80)


def test_a_workload_that_starts_says_so():
    assert workload_views.state(WORKLOAD) == "swapped"
    assert workload_views.state(msgspec.structs.replace(WORKLOAD, starting=True)) == "swapped, starting"


@pytest.mark.parametrize(
    ("device", "shown"),
    [("cpu", "cpu"), ("GPU-8f0a1b2c-11aa-22bb-33cc-445566778899", "GPU-8f0a1b2c"), ("a-b-c", "a-b-c")],
)
def test_devices_of_workloads_are_short(device, shown):
    assert workload_views.short_device(device) == shown


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (None, ("-", "-", "-", "-")),
        (ComputeStatus(), ("equal", "0%", "0 s", "0 s")),
        (ComputeStatus(12.5, 0.756, 61.0, 0.0, 2.0, held=True), ("12.5%", "76%", "1 min 1 s", "2 s")),
        (ComputeStatus(0.0, 1.0, 61.0, 0.5, exclusive=True), ("exclusive", "100%", "~1 min 1 s", "0 s")),
    ],
)
def test_what_a_workload_computes(found, shown):
    assert workload_views.compute(found) == shown


def printed(*rows):
    """Return the lines of the report."""
    made = render.console()
    with made.capture() as capture:
        made.print(workload_views.report(rows, ()))
    return [line.rstrip() for line in capture.get().splitlines()]


def computing(name, **found):
    return msgspec.structs.replace(WORKLOAD, name=name, state="resident", compute=ComputeStatus(**found))


def test_turns_have_columns_and_reasons():
    lines = printed(
        computing("chat", share=75.0, used_share=0.5),
        computing("batch", held=True, held_s=3.0),
        computing("ranks", ungated="ranks wait for each other"),
        computing("stuck", stalled=True, held=True),
    )
    assert lines[0].split("  ")[-1].strip() == "HELD"
    chat, batch = lines[1:3]
    assert "75%" in chat
    assert "50%" in chat
    assert "resident, held" in batch
    assert lines[lines.index("") + 1 :] == [
        "batch is held: `wooly why batch`",
        "ranks is not held: ranks wait for each other",
        "stuck has work and makes no progress: no other workload waits for it",
    ]


def test_a_store_without_an_arbiter_has_no_columns_of_turns():
    assert "HELD" not in printed(WORKLOAD)[0]
