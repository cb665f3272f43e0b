"""Fences that cannot be drawn fail the build, instead of being left out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

SITE = Path(__file__).resolve().parents[2] / "docs" / "site"


@pytest.fixture(scope="module")
def diagrams():
    spec = importlib.util.spec_from_file_location("diagrams", SITE / "diagrams.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["diagrams"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _texts(html: str) -> list[str]:
    return ["".join(found.itertext()) for found in ET.fromstring(html).iter("{http://www.w3.org/2000/svg}text")]


def test_a_sequence_shows_actors_and_messages(diagrams):
    texts = _texts(diagrams.sequence("a -> b: ask <1>\nb: think\nb --> a: answer"))
    assert sorted(texts) == ["a", "answer", "ask <1>", "b", "think"]


def test_states_show_names_and_events(diagrams):
    texts = _texts(diagrams.states("off -> on: press\non -> off: press again\non -> on: wait"))
    assert sorted(texts) == ["off", "on", "press", "press again", "\u21bb wait"]


def test_a_stack_shows_layers_and_their_texts(diagrams):
    assert _texts(diagrams.stack("a | b: top\nc: below")) == ["a", "b", "top", "c", "below"]


def test_nothing_is_drawn_outside_of_the_picture(diagrams):
    """Every box lies inside of the view, whatever its text is long."""
    html = diagrams.sequence(f"a -> b: {'long ' * 20}\na: {'x' * 60}\nb: {'y' * 60}")
    svg = ET.fromstring(html).find("{http://www.w3.org/2000/svg}svg")
    width, height = map(float, svg.get("viewBox").split()[2:])
    for box in svg.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.get("x")) >= 0
        assert float(box.get("x")) + float(box.get("width")) <= width
        assert float(box.get("y")) + float(box.get("height")) <= height


@pytest.mark.parametrize(("kind", "text"), [("sequence", "a sends to b"), ("states", "on: off")])
def test_a_line_of_no_known_form_is_an_error(diagrams, kind, text):
    with pytest.raises(ValueError, match="write"):
        getattr(diagrams, kind)(text)
