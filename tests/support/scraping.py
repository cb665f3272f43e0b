"""Asking a store's metrics endpoint."""

from __future__ import annotations

import contextlib
import http.client
import re

from prometheus_client.parser import text_string_to_metric_families

LOCAL = "127.0.0.1"


def get(port, path, method="GET"):
    """Status code, content type and body of an answer."""
    connection = http.client.HTTPConnection(LOCAL, port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()


def scrape(port):
    """All samples of `/metrics`."""
    code, kind, text = get(port, "/metrics")
    assert code == 200
    assert kind.startswith("text/plain")
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def metrics_port(log):
    """The free port that a store took, as its log says."""
    return int(re.search(r"health at http://127\.0\.0\.1:(\d+)", log.read_text())[1])
