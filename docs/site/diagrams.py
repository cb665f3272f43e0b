"""Draw the fences ``sequence``, ``states`` and ``stack`` of the pages as SVG, in the page, in the page's colours.

The text of a fence reads well without being drawn, so the pages also serve where nothing draws them.

``sequence``: one line a step. ``A -> B: text`` is a message (``-->``: a reply), ``A: text`` what A does by itself.
``states``: ``A -> B: event`` is a transition; states stand in the order in which they first appear.
``stack``: one line a layer, top first; ``a | b`` stand beside each other; ``: text`` at the end describes the layer.

Raises ``ValueError`` for a line that has none of these forms, which fails the build.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

CHARACTER = 6.4  # pixels that a character of 13-pixel text takes, about
LINE = 17


def sequence(source: str, *_arguments: Any, **_options: Any) -> str:
    """Draw messages between actors, from top to bottom."""
    steps = [_step(line) for line in _lines(source)]
    actors = list(dict.fromkeys(name for step in steps for name in (step.source, step.target) if name))
    at = {name: index for index, name in enumerate(actors)}
    pitch = [_pitch(steps, at, index) for index in range(len(actors) - 1)]
    margin = max(
        _width(actors[0]) / 2 + 16, *(_width(step.text) / 2 + 12 for step in steps if _alone(step, actors[0])), 60
    )
    xs = [margin]
    for width in pitch:
        xs.append(xs[-1] + width)
    last = max(
        _width(actors[-1]) / 2 + 16, *(_width(step.text) / 2 + 12 for step in steps if _alone(step, actors[-1])), 60
    )
    drawing = Drawing(width=xs[-1] + last)
    y = 52.0
    bodies: list[str] = []
    for step in steps:
        lines = _wrapped(step.text)
        y += LINE * (len(lines) - 1) + 34
        if step.target:
            x1, x2 = xs[at[step.source]], xs[at[step.target]]
            way = 1 if x2 > x1 else -1
            bodies.append(drawing.arrow([(x1, y), (x2 - way * 2, y)], dashed=step.reply))
            bodies.append(drawing.text((x1 + x2) / 2, y - 7 - LINE * (len(lines) - 1), lines, kind="label"))
        else:
            x, width = xs[at[step.source]], max(map(_width, lines)) + 16
            height = LINE * len(lines) + 8
            bodies.append(drawing.box(x - width / 2, y - height + 10, width, height, kind="note"))
            bodies.append(drawing.text(x, y - height + 10 + 17, lines))
    drawing.height = y + 30
    for name, x in zip(actors, xs, strict=True):
        drawing.add(drawing.line([(x, 40), (x, drawing.height - 8)]))
        width = _width(name) + 24
        drawing.add(drawing.box(x - width / 2, 10, width, 30))
        drawing.add(drawing.text(x, 30, [name], kind="strong"))
    drawing.add(*bodies)
    return drawing.html()


def states(source: str, *_arguments: Any, **_options: Any) -> str:
    """Draw states in a line, transitions to later ones above it and to earlier ones below it.

    A transition to the same state is written into its box.
    """
    edges: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in _lines(source):
        found = re.fullmatch(r"(.+?) -> (.+?): (.+)", line)
        if found is None:
            raise ValueError(f"no transition: {line!r}; write `A -> B: event`")
        edges[found[1], found[2]].append(found[3])
    names = list(dict.fromkeys(name for pair in edges for name in pair))
    at = {name: index for index, name in enumerate(names)}
    inside = [[f"\u21bb {label}" for label in edges.get((name, name), [])] for name in names]
    routes = [_Route(at[a], at[b], labels) for (a, b), labels in edges.items() if a != b]
    above = [route for route in routes if route.target > route.source]
    below = [route for route in routes if route.target < route.source]
    boxes = [max(_width(text) for text in (name, *events)) + 28 for name, events in zip(names, inside, strict=True)]
    lefts = [10.0]
    for index in range(1, len(names)):
        lefts.append(lefts[-1] + boxes[index - 1] + _gap(routes, boxes, index - 1))
    up, down = _levels(above), _levels(below)
    top, height = 14.0 + sum(up), 36.0 + LINE * max(map(len, inside))
    drawing = Drawing(width=lefts[-1] + boxes[-1] + 10, height=top + height + sum(down) + 14)
    for name, events, left, width in zip(names, inside, lefts, boxes, strict=True):
        drawing.add(drawing.box(left, top, width, height, kind="state"))
        drawing.add(drawing.text(left + width / 2, top + 23, [name], kind="strong"))
        if events:
            drawing.add(drawing.text(left + width / 2, top + 23 + LINE, events, kind="inside"))
    labels = []
    for side, heights, edge, way in ((above, up, top, -1), (below, down, top + height, 1)):
        for route, (x1, x2) in zip(side, _ports(side, lefts, boxes), strict=True):
            y = edge + way * sum(heights[: route.level + 1])
            first = LINE if way < 0 else -6 - LINE * (len(route.labels) - 1)
            drawing.add(drawing.arrow([(x1, edge), (x1, y), (x2, y), (x2, edge + way * 2)]))
            labels.append(drawing.text((x1 + x2) / 2, y + first, route.labels, kind="label"))
    drawing.add(*labels)
    return drawing.html()


def stack(source: str, *_arguments: Any, **_options: Any) -> str:
    """Draw layers, each above those that it uses."""
    rows = []
    for line in _lines(source):
        beside, _, text = line.partition(": ")
        rows.append(([name.strip() for name in beside.split("|")], text.strip()))
    inner = max(sum(_width(name) + 40 for name in names) for names, _ in rows)
    texts = max(_width(text) for _, text in rows)
    drawing = Drawing(width=inner + texts + 40)
    y = 10.0
    for names, text in rows:
        width = (inner - 8 * (len(names) - 1)) / len(names)
        for index, name in enumerate(names):
            x = 10 + index * (width + 8)
            drawing.add(drawing.box(x, y, width, 32))
            drawing.add(drawing.text(x + width / 2, y + 21, [name], kind="strong"))
        drawing.add(drawing.text(inner + 24, y + 21, [text], anchor="start"))
        y += 40
    drawing.height = y + 4
    return drawing.html()


@dataclass(frozen=True)
class _Step:
    source: str
    target: str
    text: str
    reply: bool


def _step(line: str) -> _Step:
    if found := re.fullmatch(r"(.+?) (--?>) (.+?): (.+)", line):
        return _Step(found[1], found[3], found[4], found[2] == "-->")
    if found := re.fullmatch(r"([^:>]+?): (.+)", line):
        return _Step(found[1], "", found[2], reply=False)
    raise ValueError(f"no step: {line!r}; write `A -> B: text`, `A --> B: text` or `A: text`")


def _alone(step: _Step, actor: str) -> bool:
    return step.source == actor and not step.target


def _pitch(steps: Sequence[_Step], at: dict[str, int], index: int) -> float:
    """Return the pixels between an actor and the next one, for the widest text between them."""
    widest = 100.0
    for step in steps:
        width = max(map(_width, _wrapped(step.text))) + 24
        if not step.target:
            if at[step.source] in {index, index + 1}:
                widest = max(widest, width / 2 + 20)
            continue
        low, high = sorted((at[step.source], at[step.target]))
        if low <= index < high:
            widest = max(widest, width / (high - low))
    return widest


@dataclass
class _Route:
    source: int
    target: int
    labels: list[str]
    level: int = 0

    @property
    def span(self) -> tuple[int, int]:
        low, high = sorted((self.source, self.target))
        return low, high


def _gap(routes: Sequence[_Route], boxes: Sequence[float], index: int) -> float:
    """Return the pixels between a state and the next one, for the labels over the gap."""
    needed = [48.0]
    for route in routes:
        low, high = route.span
        if low <= index < high:
            between = sum(boxes[low + 1 : high])
            needed.append((max(map(_width, route.labels)) + 24 - between) / (high - low))
    return max(needed)


def _levels(routes: list[_Route]) -> list[float]:
    """Give each route a level at which it overlaps no other; return the height of each level."""
    taken: list[list[tuple[int, int]]] = []
    heights: list[float] = []
    for route in sorted(routes, key=lambda one: (one.span[1] - one.span[0], one.span)):
        low, high = route.span
        while route.level < len(taken) and any(low < b and a < high for a, b in taken[route.level]):
            route.level += 1
        if route.level == len(taken):
            taken.append([])
            heights.append(0.0)
        taken[route.level].append(route.span)
        heights[route.level] = max(heights[route.level], LINE * len(route.labels) + 16.0)
    return heights


def _ports(routes: Sequence[_Route], lefts: Sequence[float], boxes: Sequence[float]) -> list[tuple[float, float]]:
    """Return where each route leaves and enters: spread over a state's side, so that few lines cross."""
    ends: dict[int, list[tuple[int, float, int, int]]] = defaultdict(list)
    for number, route in enumerate(routes):
        for end, (state, other) in enumerate([(route.source, route.target), (route.target, route.source)]):
            far = abs(other - state) + route.level / 100
            ends[state].append((1, -far, number, end) if other > state else (0, far, number, end))
    found = [[0.0, 0.0] for _ in routes]
    for state, ports in ends.items():
        for place, (_, _, number, end) in enumerate(sorted(ports), start=1):
            found[number][end] = lefts[state] + boxes[state] * place / (len(ports) + 1)
    return [(a, b) for a, b in found]


@dataclass
class Drawing:
    """An SVG that takes its colours from the page (``docs/assets/wooly.css``)."""

    width: float
    height: float = 0.0
    parts: list[str] = field(default_factory=list)

    def add(self, *parts: str) -> None:
        """Add parts, over those that were added before."""
        self.parts += parts

    @staticmethod
    def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
        """Return a box; ``kind`` is its class in the style sheet."""
        return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4"/>'

    @staticmethod
    def text(x: float, y: float, lines: Sequence[str], *, kind: str = "plain", anchor: str = "middle") -> str:
        """Return lines of text, the first with its base line at ``y``. A ``label`` covers the lines below it."""
        spans = "".join(
            f'<tspan x="{x:.1f}" dy="{LINE if index else 0}">{escape(line)}</tspan>' for index, line in enumerate(lines)
        )
        return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{spans}</text>'

    @staticmethod
    def line(points: Sequence[tuple[float, float]]) -> str:
        """Return a thin line."""
        return f'<path class="life" d="{_path(points)}"/>'

    @staticmethod
    def arrow(points: Sequence[tuple[float, float]], *, dashed: bool = False) -> str:
        """Return a line with a head at its end."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        head = [(x, y), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx), (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx)]
        kind = "arrow dashed" if dashed else "arrow"
        return f'<path class="{kind}" d="{_path(points)}"/><path class="head" d="{_path(head)}Z"/>'

    def html(self) -> str:
        """Return the drawing, in a frame that scrolls where the page is narrower."""
        width, height = round(self.width), round(self.height)
        return (
            f'<div class="diagram"><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'style="max-width: {width}px; min-width: {min(width, 780)}px" role="img">{"".join(self.parts)}</svg></div>'
        )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _lines(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines() if line.strip()]


def _wrapped(text: str, most: int = 44) -> list[str]:
    """Break a text at ``; `` and, where it is long, between words."""
    lines: list[str] = []
    for part in text.split("; "):
        for word in part.split():
            if lines and len(lines[-1]) + len(word) < most and not lines[-1].endswith("\0"):
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        lines[-1] += "\0"
    return [line.removesuffix("\0") for line in lines]


def _width(text: str) -> float:
    return CHARACTER * len(text)
