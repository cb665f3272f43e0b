"""The documents match the program."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import typer
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from shared_store.base import envs, errors
from shared_store.base.workloads import WorkloadMemory, WorkloadStatus
from shared_store.cli import app
from shared_store.store.observe.exposition import StatusCollector

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(scope="module")
def cli():
    """The sections of `cli.md` by heading."""
    parts = re.split(r"^##+ (.+)$", (DOCS / "cli.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def cells(text, column=0):
    """Return the cells of a column in all tables of a text."""
    return [line.strip("|").split("|")[column].strip() for line in text.splitlines() if line.startswith("| ")]


def test_every_command_has_a_section(cli):
    """All commands are described, and no others."""
    described = {heading.strip("`").removeprefix("wooly ") for heading in cli if heading.startswith("`wooly ")}
    assert described == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described(cli, command):
    """The table of a command has all its options with their placeholders, and no others."""
    expected = {
        " ".join([parameter.opts[0], parameter.metavar or ""]).strip()
        for parameter in COMMANDS[command].params
        if parameter.param_type_name == "option"
    }
    described = {cell.strip("`") for cell in cells(cli[f"`wooly {command}`"]) if cell.startswith("`--")}
    assert described == expected


def test_exit_codes(cli):
    """The table of exit codes matches the error classes."""
    expected = {}
    for cls in errors._all_subclasses(errors.WoolyError):
        expected.setdefault(str(cls.exit_code), set()).add(cls.code)
    text = cli["Exit codes"]
    described = {
        number: set(re.findall("`(.+?)`", codes))
        for number, codes in zip(cells(text), cells(text, 1), strict=True)
        if number.isdigit() and number != "0"
    }
    assert described == expected


def test_metrics(cli, status):
    """The table has all exposed metrics with their labels, and no others."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(status))
    exposed = {
        (sample.name, tuple(sample.labels))
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }
    text = cli["Metrics and health"]
    described = {
        (name, tuple(re.findall("`(.+?)`", labels)))
        for names, labels in zip(cells(text), cells(text, 1), strict=True)
        for name in re.findall("`(wooly_.+?)`", names)
    }
    assert described == exposed


def test_fields_of_the_status(cli, status):
    """The table has every field of the snapshot."""
    text = cli["`wooly status`"]
    meanings = dict(zip(cells(text), cells(text, 1), strict=True))
    for name, value in msgspec.to_builtins(status).items():
        if name == "workloads":
            continue  # has a table of its own
        part = value[0] if isinstance(value, tuple | list) else value
        meaning = meanings[f"`{name}[]`" if part is not value else f"`{name}`"]
        for field in part if isinstance(part, dict) else ():
            assert f"`{field}`" in meaning, f"{name}.{field} is not described"


def test_fields_of_a_workload(cli):
    """The table has every field of a workload, and of its memory, and the status refers to it."""
    text = cli["`wooly workloads`"]
    described = {name.removesuffix("[]") for cell in cells(text) for name in re.findall("`(.+?)`", cell)}
    assert set(WorkloadStatus.__struct_fields__) == {name for name in described if not name.startswith("--")}
    meanings = dict(zip(cells(text), cells(text, 1), strict=True))
    for field in WorkloadMemory.__struct_fields__:
        assert f"`{field}`" in meanings["`memory[]`"]
    assert "(#wooly-workloads)" in cli["`wooly status`"]


def test_every_event_is_described(cli):
    """A kind that the code sends is in the table, and a kind in the table is in the code."""
    root = DOCS.parent / "shared_store"
    code = "\n".join(path.read_text() for path in root.rglob("*.py"))
    described = {cell.strip("`") for cell in cells(cli["`wooly events`"]) if re.fullmatch(r"`[a-z]+(_[a-z]+)*`", cell)}
    sent = set(re.findall(r"\.(?:event|notice)\(\s*\"(\w+)\"", code))
    assert sent - described == set()
    assert {kind for kind in described if f'"{kind}"' not in code} == set()


def test_environment():
    """The table of variables matches the registry."""
    rows = [line for line in (DOCS / "environment.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{one.name}` | {f'`{one.default}`' if one.default else ''} | {one.meaning} |" for one in envs.REGISTRY
    ]
