"""The dashboard and the alerts use metrics of a running store, and link to the documents."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from support.plain_workload import PlainWorkload
from support.scraping import LOCAL, metrics_port, scrape

from shared_store.base.errors import DeclinedError

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "wooly.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "wooly-alerts.yml").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]


@pytest.fixture
def exposed(wooly, directory, actor):
    """Return metric names and labels of a store with a limit, a model, requests, swaps, and one that was refused."""
    limits = ("--max-resident", "cpu=1GiB", "--budget", "cpu=1GiB", "--vram-reserve", "0", "--min-resident", "0")
    done = wooly("serve", "--detach", "--metrics", f"{LOCAL}:0", *limits)
    assert done.returncode == 0, done.stderr
    actor().publish(key=f"{1:064x}", model=[[1, 100_000]])
    with (
        PlainWorkload(directory, "one", device="cpu", needs=600) as one,
        PlainWorkload(directory, "two", device="cpu", needs=600) as two,
    ):
        one.join()
        two.join()
        one.enter()
        two.enter()  # `one` leaves for it
        two.leave = decline
        with pytest.raises(DeclinedError):
            two.session.workloads.move("two", out=True)
        found = {}
        for sample in scrape(metrics_port(directory / "store.log")):
            found.setdefault(sample.name, set()).update(sample.labels)
        return found


def decline(_request, _call):
    raise DeclinedError("it has something to do")


def metrics(expression):
    """Return the name and the selector of each metric in a query."""
    return re.findall(r"\b((?:wooly|process)_[a-z_]+)(\{[^}]*\})?", expression)


def test_dashboard_and_alerts_use_existing_metrics(exposed):
    """The metrics exist, and the labels that select and group them."""
    asked = {"instance", "job"}  # what Prometheus itself adds
    for expression in [*EXPRESSIONS, *(rule["expr"] for rule in RULES)]:
        names = metrics(expression)
        assert names or expression.startswith('up{job="wooly"}'), expression
        labels = set().union(*(exposed[name] for name, _ in names)) | asked
        used = {label for _, selector in names for label in re.findall(r"(\w+)=", selector)}
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        assert used | grouped <= labels, expression


def test_legends_and_summaries_use_existing_labels(exposed):
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            labels = set().union(*(exposed[name] for name, _ in metrics(target["expr"]))) | {"instance"}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, panel["title"]
    for rule in RULES:
        labels = set().union(*(exposed[name] for name, _ in metrics(rule["expr"]))) | {"instance"}
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= labels, rule["alert"]


def test_the_dashboard_has_all_of_woolys_metrics(exposed):
    shown = {name for expression in EXPRESSIONS for name, _ in metrics(expression)}
    assert {name for name in exposed if name.startswith("wooly_")} - shown == set()


def test_panels_do_not_overlap():
    """Panels do not overlap, and each has a description."""
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        assert panel["type"] == "row" or panel["description"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_alert_links_to_a_procedure():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert [rule["annotations"]["runbook"] for rule in RULES if rule["annotations"]["runbook"] not in headings] == []
    assert all(
        rule["labels"]["severity"] in {"critical", "warning"} and rule["annotations"]["summary"] for rule in RULES
    )
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
