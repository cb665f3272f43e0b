"""Metrics and health over HTTP, for scrapers and probes. Off unless an address is configured.

``/metrics`` (Prometheus text), ``/healthz`` (the process is alive) and ``/readyz`` (it serves clients). Each request
is answered by a thread, which waits for the peer at most :data:`PEER_WITHIN_S`. There are at most :data:`MAX_REQUESTS`
threads, so idle peers exhaust neither the store's event loop nor its descriptors.

Does not promise: secrecy. Every process that reaches the address can read the names and keys of models.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import socketserver
import threading
from concurrent.futures import TimeoutError as FutureTimeoutError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

from shared_store.base.errors import ConfigError
from shared_store.store.observe.exposition import StatusCollector

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared_store.base.status import Status

log = logging.getLogger(__name__)

PEER_WITHIN_S: Final = 5.0
"""Seconds without a byte sent or received after which a peer's connection is closed."""

MAX_REQUESTS: Final = 32
"""Most requests at a time; a further connection is closed at once."""

_PATHS: Final = ("/metrics", "/healthz", "/readyz")


class Endpoint:
    """Serves one store's metrics and health."""

    def __init__(self, address: str, status: Callable[[], Status]) -> None:
        """Prepare to listen at ``HOST:PORT``.

        Args:
            address: a name or IP address (IPv6 in brackets) and a port; port 0 selects a free one.
            status: returns the snapshot; called in other threads.

        Raises:
            ConfigError: the address has another form.
        """
        self._address = address
        self._host, self._port = parse_address(address)
        self._status = status
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port of the address, or the selected port after :meth:`start`."""
        return self._port

    def start(self) -> None:
        """Listen and serve. Raises :class:`ConfigError` if the address cannot be used."""
        try:
            family, _, _, _, where = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, where, self._status)
        except OSError as error:
            raise ConfigError(
                f"--metrics {self._address}: cannot listen there: {error.strerror or error}; use another HOST:PORT"
            ) from error
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="wooly-metrics", daemon=True)
        self._thread.start()
        log.info(
            "metrics and health at http://%s:%d", f"[{self._host}]" if ":" in self._host else self._host, self._port
        )

    def stop(self) -> None:
        """Stop listening, without waiting for requests in progress. Idempotent; may be called before :meth:`start`."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``. Raises :class:`ConfigError` with the option and the form."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # IPv6 without brackets: the start of the port is ambiguous
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(
            f"--metrics {address!r} is not of the form HOST:PORT, such as 127.0.0.1:9400 or [::1]:9400; "
            "0.0.0.0 listens on all interfaces"
        )
    return host, int(port)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = MAX_REQUESTS
    block_on_close = False  # a stuck peer must not delay the end of the store

    def __init__(self, family: int, where: Any, status: Callable[[], Status]) -> None:
        self.address_family = family
        self.status = status
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(where, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own method looks up the host's name, which is not used here and can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "wooly", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            log.debug("metrics: %d requests are in progress; closed a further connection", MAX_REQUESTS)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's signature
        log.debug("metrics: a request failed", exc_info=True)  # noqa: LOG014 - called while an exception is handled


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "wooly"
    timeout = PEER_WITHIN_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._json(200, {"alive": True})
        elif path not in _PATHS:
            self._json(404, {"error": f"the paths are {', '.join(_PATHS)}"})
        else:
            try:
                status = self.server.status()
            except (FutureTimeoutError, RuntimeError):  # the event loop is blocked or has ended
                log.warning("metrics: the event loop did not return a status in time")
                self._json(503, {"ready": False, "state": "unresponsive"})
                return
            if path == "/readyz":
                self._json(200, {"ready": True, "state": status.store.state, "reasons": status.store.reasons})
            else:
                registry = CollectorRegistry()
                ProcessCollector(registry=registry)
                registry.register(StatusCollector(status))
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))

    def do_HEAD(self) -> None:
        self.do_GET()

    def _json(self, code: int, body: object) -> None:
        self._answer(code, "application/json", json.dumps(body).encode() + b"\n")

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # the peer closed the connection
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        log.debug("metrics: %s", format % args)
