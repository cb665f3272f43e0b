"""Metrics and health over HTTP, and peers that try to block the store."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from pathlib import Path

import msgspec
import pytest
from support.scraping import LOCAL, get, metrics_port, scrape
from support.waiting import wait_until

from shared_store.base.errors import ConfigError
from shared_store.base.status import ArbiterStatus
from shared_store.store.observe import endpoint as module
from shared_store.store.observe.endpoint import MAX_REQUESTS, Endpoint, parse_address


@pytest.fixture
def serve():
    """Start an endpoint on a free port. It stops with the test."""
    started = []

    def start(status):
        started.append(Endpoint(f"{LOCAL}:0", status))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop()


def samples(port):
    return {(sample.name, *sample.labels.values()): sample.value for sample in scrape(port)}


def connect(port):
    return socket.create_connection((LOCAL, port), timeout=10)


ENDS = ("0.0005", "0.001", "0.005", "0.025", "0.1", "0.5", "2.5", "10.0", "60.0", "600.0", "+Inf")
WAITS = [("0", 0), ("1", 1), ("2", 2), ("3", 3), ("4", 4)]
CHAT, BATCH = ("0", "chat"), ("3", "batch")
STATES = ("resident", "draining", "leaving", "swapped", "returning", "checkpointed")
OVERCOMMIT = {
    ("wooly_overcommit", "cpu"): 1,
    ("wooly_budget_bytes", "cpu"): 32 << 30,
    ("wooly_reserve_bytes", "cpu"): 1 << 28,
    ("wooly_reserve_bytes", "GPU-1"): 0,
    ("wooly_free_bytes", "cpu"): -(1 << 20),
    ("wooly_granted_bytes", "cpu"): 1 << 23,
    ("wooly_granted_bytes", "GPU-1"): 0,
    ("wooly_foreign_bytes", "cpu"): 1 << 24,
    **{("wooly_workloads", state): 1 if state in {"resident", "swapped"} else 0 for state in STATES},
    ("wooly_workload_private_bytes", "cpu", "chat"): 5 << 30,
    ("wooly_workload_private_bytes", "cpu", "batch"): 1 << 20,
    ("wooly_workload_shared_bytes", "cpu", "chat"): 3 << 30,
    ("wooly_workload_shared_bytes", "cpu", "batch"): 0,
    ("wooly_workload_wait_seconds", *CHAT): 0,
    ("wooly_workload_wait_seconds", *BATCH): 2.5,
    ("wooly_workload_starved_seconds_total", *CHAT): 1.5,
    ("wooly_workload_starved_seconds_total", *BATCH): 4.5,
    ("wooly_workload_swaps_total", *CHAT): 2,
    ("wooly_workload_swaps_total", *BATCH): 0,
    ("wooly_swaps_total", "out"): 2,
    ("wooly_swaps_total", "in"): 1,
    ("wooly_swapped_bytes_total", "out"): 7 << 20,
    ("wooly_swapped_bytes_total", "in"): 5 << 20,
    **{
        ("wooly_swap_step_seconds_bucket", end, "copy"): count
        for end, count in zip(ENDS, (0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3), strict=True)
    },
    ("wooly_swap_step_seconds_count", "copy"): 3,
    ("wooly_swap_step_seconds_sum", "copy"): 0.5,
    **{
        ("wooly_memory_wait_seconds_bucket", end, priority): 0 if float(end) < 0.5 else count
        for end in ENDS
        for priority, count in WAITS
    },
    **{("wooly_memory_wait_seconds_count", priority): count for priority, count in WAITS},
    **{("wooly_memory_wait_seconds_sum", priority): count / 4 for priority, count in WAITS},
    **{("wooly_memory_waiting", priority): int(priority == "3") for priority, _ in WAITS},
    ("wooly_swap_refusals_total", "declined"): 1,
}

COMPUTE = {
    ("wooly_arbiter_up",): 1,
    ("wooly_arbiter_restarts_total",): 2,
    ("wooly_workload_device_seconds_total", *CHAT): 3725.5,
    ("wooly_workload_device_estimated_seconds_total", *CHAT): 12.25,
    ("wooly_workload_held_seconds_total", *CHAT): 1.5,
    ("wooly_workload_held", *CHAT): 0,
    ("wooly_workload_stalled", *CHAT): 0,
    ("wooly_workload_share_ratio", *CHAT): 0.75,
    ("wooly_workload_used_share_ratio", *CHAT): 0.625,
    ("wooly_workload_device_seconds_total", *BATCH): 61.0,
    ("wooly_workload_device_estimated_seconds_total", *BATCH): 0,
    ("wooly_workload_held_seconds_total", *BATCH): 42.5,
    ("wooly_workload_held", *BATCH): 1,
    ("wooly_workload_stalled", *BATCH): 1,
    ("wooly_workload_share_ratio", *BATCH): 0,
    ("wooly_workload_used_share_ratio", *BATCH): 0.125,
}


def test_metrics_equal_the_status(serve, status):
    """Every number of the snapshot is exposed with its labels, and names are escaped."""
    found = {name: value for name, value in samples(serve(lambda: status).port).items() if "process_" not in name[0]}
    base, odd = ("a1" * 32, "base"), ("b2" * 32, 'odd "name"\\')
    assert found == {
        ("wooly_build_info", "1.2.3"): 1,
        ("wooly_up",): 1,
        ("wooly_degraded",): 1,
        ("wooly_uptime_seconds",): 93784.5,
        ("wooly_catalog_up",): 0,
        ("wooly_mapped_bytes",): 6 << 30,
        ("wooly_saved_bytes",): 3 << 30,
        ("wooly_resident_bytes", "cpu"): 4 << 30,
        ("wooly_resident_bytes", "GPU-1"): 1 << 20,
        ("wooly_limit_bytes", "cpu"): 64 << 30,
        ("wooly_segments", "cpu"): 5,
        ("wooly_segments", "GPU-1"): 1,
        ("wooly_dead_bytes", "cpu"): 3 << 20,
        ("wooly_dead_bytes", "GPU-1"): 0,
        ("wooly_padding_bytes", "cpu"): 2 << 20,
        ("wooly_padding_bytes", "GPU-1"): 0,
        ("wooly_quarantined_bytes", "cpu"): 2 << 20,
        ("wooly_quarantined_bytes", "GPU-1"): 0,
        ("wooly_models", "committed"): 1,
        ("wooly_models", "publishing"): 1,
        ("wooly_clients", "publisher"): 1,
        ("wooly_clients", "reader"): 2,
        ("wooly_clients", "waiting"): 0,
        ("wooly_clients", "idle"): 1,
        ("wooly_model_readers", *base): 2,
        ("wooly_model_readers", *odd): 0,
        ("wooly_model_bytes", *base): 3 << 30,
        ("wooly_model_bytes", *odd): 0,
        ("wooly_model_away_readers", *base): 1,
        ("wooly_model_away_readers", *odd): 0,
        **{("wooly_model_tier_bytes", *odd, tier): 0 for tier in ("resident", "host", "disk")},
        ("wooly_model_tier_bytes", *base, "resident"): (3 << 30) // 4,
        ("wooly_model_tier_bytes", *base, "host"): (3 << 30) // 8,
        ("wooly_model_tier_bytes", *base, "disk"): (3 << 30) // 16,
        ("wooly_host_copy_bytes", "cpu"): 1 << 22,
        ("wooly_host_copy_bytes", "GPU-1"): 0,
        ("wooly_disk_copy_bytes", "cpu"): 1 << 25,
        ("wooly_disk_copy_bytes", "GPU-1"): 0,
        ("wooly_private_bytes",): 2 * ((3 << 30) // 100),
        ("wooly_model_unique_bytes", *base): 3 << 29,
        ("wooly_model_unique_bytes", *odd): 0,
        **{
            ("wooly_request_duration_seconds_bucket", end, "open"): count
            for end, count in zip(ENDS, (1, 3, 3, 3, 3, 3, 5, 5, 5, 5, 6), strict=True)
        },
        ("wooly_request_duration_seconds_count", "open"): 6,
        ("wooly_request_duration_seconds_sum", "open"): 12.5,
        ("wooly_attaches_total",): 7,
        ("wooly_publishes_total",): 2,
        ("wooly_aborted_publishes_total",): 1,
        ("wooly_fallbacks_total",): 3,
        ("wooly_protocol_errors_total",): 4,
        ("wooly_evictions_total",): 5,
        ("wooly_compactions_total",): 6,
        ("wooly_quarantines_total",): 8,
        ("wooly_permission_denials_total",): 9,
        ("wooly_unconfirmed_releases_total",): 10,
        ("wooly_sleeps_total",): 11,
        ("wooly_wakes_total",): 12,
        ("wooly_returns_total",): 13,
        ("wooly_keeper_up",): 1,
        ("wooly_store_restarts_total",): 3,
        **pauses("wooly_loop_callback_seconds", (0, 8, 8, 8, 8, 8, 8, 8, 9, 9, 9), 9, 0.5),
        **pauses("wooly_gc_pause_seconds", (0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2), 2, 0.125),
        ("wooly_loop_callback_longest_seconds",): 0.25,
        ("wooly_loop_callback_longest_cpu_seconds",): 0.0625,
        **OVERCOMMIT,
        **COMPUTE,
    }


def pauses(name, counts, count, total):
    """Return the samples of a histogram of pauses."""
    ends = ("0.0001", "0.0005", "0.001", "0.005", "0.01", "0.025", "0.05", "0.1", "0.5", "2.5", "+Inf")
    buckets = {(f"{name}_bucket", end): found for end, found in zip(ends, counts, strict=True)}
    return {**buckets, (f"{name}_count",): count, (f"{name}_sum",): total}


def test_one_snapshot_for_a_scrape(serve, status):
    """All numbers of an answer are from one snapshot."""
    taken = []
    samples(serve(lambda: taken.append(1) or status).port)
    assert len(taken) == 1


def test_health(serve, status):
    """A degraded store is alive and ready, with its state in the answer."""
    port = serve(lambda: status).port
    code, kind, body = get(port, "/healthz")
    assert (code, kind, json.loads(body)) == (200, "application/json", {"alive": True})
    code, _, body = get(port, "/readyz")
    assert code == 200
    assert json.loads(body) == {"ready": True, "state": "degraded", "reasons": ["the catalog does not answer"]}


def test_head_has_no_body(serve, status):
    """HEAD returns the headers of GET."""
    assert get(serve(lambda: status).port, "/readyz", "HEAD") == (200, "application/json", "")


def test_unknown_path_names_the_paths(serve, status):
    """The answer to an unknown path lists the valid paths."""
    code, _, body = get(serve(lambda: status).port, "/metric")
    assert code == 404
    assert "/metrics, /healthz, /readyz" in body


def test_unresponsive_store_is_alive_but_not_ready(serve):
    """If the store's event loop does not respond, only the liveness probe passes."""

    def stuck():
        raise TimeoutError

    port = serve(stuck).port
    assert get(port, "/healthz")[0] == 200
    assert get(port, "/readyz")[0] == 503
    assert get(port, "/metrics")[0] == 503


def test_slow_peers_do_not_block_others(serve, status):
    """A silent peer, and a request with a slow snapshot, delay neither other requests nor the stop."""
    asked, go_on = threading.Event(), threading.Event()

    def slow_once():
        if not asked.is_set():
            asked.set()
            go_on.wait(10)
        return status

    one = serve(slow_once)
    with connect(one.port), connect(one.port) as waiting:
        waiting.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert asked.wait(10)
        assert samples(one.port)
        one.stop()
        go_on.set()
        assert waiting.recv(1 << 16)


def test_silent_peer_is_disconnected(serve, status, monkeypatch):
    """A connection without a request is closed after the time-out."""
    monkeypatch.setattr(module._Handler, "timeout", 0.05)
    with connect(serve(lambda: status).port) as silent:
        assert silent.recv(1) == b""


def test_flood_of_connections_is_bounded(serve, status):
    """A connection over the limit is closed at once. Requests are served again when others disconnect."""
    port = serve(lambda: status).port
    with contextlib.ExitStack() as connections:
        peers = [connections.enter_context(connect(port)) for _ in range(MAX_REQUESTS)]
        with connect(port) as further:
            assert further.recv(1) == b""
        for peer in peers:
            peer.close()

        def served():
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionError):
                return get(port, "/healthz")[0] == 200
            return False

        wait_until(served, "a request to be served again")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:9400", ("127.0.0.1", 9400)), ("[::1]:1", ("::1", 1)), ("localhost:0", ("localhost", 0))],
)
def test_address(address, expected):
    """Valid forms."""
    assert parse_address(address) == expected


@pytest.mark.parametrize(
    "address",
    ["", "9400", ":9400", "host", "host:", "host:x", "host:65536", "host:-1", "::1:9400", "host:²"],
)
def test_bad_address_names_option_and_form(address):
    """Other forms are refused with the option's name and the valid form."""
    with pytest.raises(ConfigError, match=r"--metrics .* HOST:PORT"):
        Endpoint(address, lambda: None)


def test_port_in_use(serve, status):
    """A used port is an error that names the option. Stopping an endpoint that never started does nothing."""
    taken = serve(lambda: status).port
    second = Endpoint(f"{LOCAL}:{taken}", lambda: status)
    with pytest.raises(ConfigError, match=rf"--metrics {LOCAL}:{taken}: cannot listen there"):
        second.start()
    second.stop()


def test_real_store(wooly, directory, actor):
    """`wooly serve --metrics` counts a model and its reader, and stops with the store."""
    assert wooly("serve", "--detach", "--metrics", f"{LOCAL}:0").returncode == 0
    port = metrics_port(directory / "store.log")
    key = f"{1:064x}"
    actor().publish(key=key, model=[[1, 100_000]])
    found = samples(port)
    assert found["wooly_model_readers", key, "model"] == 1
    assert found["wooly_model_bytes", key, "model"] == 100_000
    assert found["wooly_publishes_total",] == 1
    assert found["wooly_request_duration_seconds_count", "commit"] == 1
    assert found["wooly_request_duration_seconds_bucket", "+Inf", "commit"] == 1
    assert found["process_open_fds",] > 3
    assert found["wooly_resident_bytes", "cpu"] >= 100_000
    assert get(port, "/readyz")[0] == 200
    assert tcp_sockets(json.loads(wooly("status", "--json").stdout)["store"]["pid"])
    assert wooly("stop").returncode == 0
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_no_port_unless_asked_for(store):
    """Without the option the store's process has no TCP socket."""
    assert not tcp_sockets(store.pid)


def tcp_sockets(pid):
    """Inodes of a process's TCP sockets (see `proc_pid_net(5)`)."""
    process = Path(f"/proc/{pid}")
    known = {
        line.split()[9] for table in ("tcp", "tcp6") for line in (process / "net" / table).read_text().splitlines()[1:]
    }
    targets = [str(fd.readlink()) for fd in (process / "fd").iterdir()]
    return known & {target.removeprefix("socket:[").removesuffix("]") for target in targets}


def test_a_store_without_an_arbiter_has_no_metrics_of_one(serve, status):
    """No metric says 0 for what is not measured."""
    rows = tuple(msgspec.structs.replace(one, compute=None) for one in status.workloads)
    without = msgspec.structs.replace(status, arbiter=None, workloads=rows)
    found = set(samples(serve(lambda: without).port))
    assert found.isdisjoint(COMPUTE)
    lost = msgspec.structs.replace(status, arbiter=ArbiterStatus("lost", restarts=3))
    assert samples(serve(lambda: lost).port)[("wooly_arbiter_up",)] == 0
