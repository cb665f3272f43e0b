"""Pages name what exists: files, anchors, folders, transitions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from shared_store.base import workload_states
from shared_store.store.state.models import TRANSITIONS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "deploy").glob("*.md")])
TREE = re.compile(r"`((?:shared_store|wooly_vllm|wooly_hf|deploy|benchmarks|examples|docs|tests)/[\w./-]*[\w/])`")


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _text(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page):
    """Every relative link names a file of the repository, as pages are also read there, and a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if re.match(r"\w+://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_named_files_exist(page):
    """A path of the tree in a page is a file or folder in the tree."""
    if page.name == "CHANGELOG.md":
        return
    assert [path for path in TREE.findall(_text(page)) if not (ROOT / path).exists()] == []


def test_every_folder_of_the_packages_is_on_the_architecture_page():
    text = (DOCS / "architecture.md").read_text()
    folders = {
        _id(init.parent)
        for package in ("shared_store", "wooly_vllm", "wooly_hf")
        for init in (ROOT / package).rglob("__init__.py")
    }
    folders -= {"shared_store", *(folder for folder in folders if folder.startswith(("wooly_vllm/", "wooly_hf/")))}
    assert {folder for folder in folders if f"`{folder}`" not in text} == set()


def test_the_layers_are_those_that_are_enforced():
    """The stack on the architecture page is the contract of import-linter, top to bottom."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    enforced = [
        {name.strip().replace("shared_store.", "").replace(".", "/") for name in re.split(r"[|:]", layer)}
        for layer in layers
        if layer != "shared_store.daemon"
    ]
    fence = re.search(r"```stack\n(.+?)```", (DOCS / "architecture.md").read_text(), re.DOTALL)
    assert fence is not None
    drawn = [
        {name.strip().replace("shared_store/", "") for name in line.partition(": ")[0].split("|")}
        for line in fence[1].splitlines()
    ]
    assert drawn == [layer - {"daemon"} for layer in enforced]


def test_the_states_of_a_model_are_those_of_the_code():
    """The diagram of a model has every transition of the table, with its action, and no other."""
    section = (DOCS / "architecture.md").read_text().partition("### A model\n")[2].partition("\n### ")[0]
    drawn = set(re.findall(r"^(\w+) -> (\w+): (.+) / (.+)$", section, re.MULTILINE))
    assert drawn == {
        (before.value, after.value, event.value, action.value)
        for (before, event), (after, action) in TRANSITIONS.items()
    }


def test_the_states_of_a_workload_are_those_of_the_code():
    """The diagram has every transition of the table with its event, and no other; the table below has every state."""
    section = (DOCS / "overcommit.md").read_text().partition("## States\n")[2].partition("\n## ")[0]
    drawn = set(re.findall(r"^(\w+) -> (\w+): (.+)$", section, re.MULTILINE))
    assert drawn == {
        (before.value, after.value, event.value) for (before, event), after in workload_states.TRANSITIONS.items()
    }
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == [state.value for state in workload_states.WorkloadState]


def test_decisions_are_all_in_the_index_and_in_the_navigation():
    pages = sorted(page.name for page in (DOCS / "decisions").glob("0*.md"))
    index = (DOCS / "decisions" / "index.md").read_text()
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert re.findall(r"\]\((0.+?\.md)\)", index) == pages
    assert re.findall(r"decisions/(0.+?\.md)", navigation) == pages


def test_fragments_of_the_changelog_have_a_kind_and_a_text():
    """A fragment with an unknown kind would be left out of the release's section without a word."""
    kinds = {
        kind["directory"] for kind in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]["type"]
    }
    for fragment in (DOCS / "changelog.d").iterdir():
        if fragment.name == "README.md":
            continue
        assert re.fullmatch(r"(?:\+[\w-]+|\d+)\.(\w+)\.md", fragment.name), fragment.name
        assert fragment.name.split(".")[1] in kinds, fragment.name
        assert fragment.read_text().strip()


@pytest.mark.parametrize(
    ("page", "engine"),
    [
        ("README.md", "vllm"),
        ("docs/vllm.md", "vllm"),
        ("README.md", "transformers"),
        ("docs/huggingface.md", "transformers"),
    ],
)
def test_supported_versions_are_those_of_the_package(page, engine):
    """The first and the last minor version that the extras admit."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = [one for extra in extras.values() for one in extra if one.startswith(f"{engine}>=")]
    first, end = re.findall(r"[\d.]+", asked)
    last = f"{end.partition('.')[0]}.{int(end.partition('.')[2]) - 1}"
    name = {"vllm": "vLLM"}.get(engine, engine)
    assert f"{name} {first} to {last}" in " ".join((ROOT / page).read_text().split())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
