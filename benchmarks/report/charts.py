"""Charts: single bars, pairs of bars, lines of growth, and lines by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

STOCK, WOOLY, OTHER = "#9aa5b1", "#2f6f9f", "#c98a3b"
"""Colours of stock engines, of wooly, and of anything else."""

Bar = tuple[str, float, str]
"""Label, height and colour."""


def bars(title: str, unit: str, values: Sequence[Bar]) -> Figure:
    """Return a chart with one bar per value, and the value above it."""
    figure, axes = _chart(title, unit, 1.25 * len(values), [value for _, value, _ in values])
    drawn = axes.bar([label for label, _, _ in values], [value for _, value, _ in values])
    for bar, (_, _, colour) in zip(drawn, values, strict=True):
        bar.set_color(colour)
    axes.bar_label(drawn, labels=[_written(value, 4) for _, value, _ in values], padding=2)
    return figure


def pairs(title: str, unit: str, labels: Sequence[str], stock: Sequence[float], wooly: Sequence[float]) -> Figure:
    """Return a chart with two bars per label: stock and wooly."""
    return groups(title, unit, labels, {"stock": stock, "wooly": wooly}, (STOCK, WOOLY))


def groups(
    title: str, unit: str, labels: Sequence[str], values: Mapping[str, Sequence[float]], colours: Sequence[str]
) -> Figure:
    """Return a chart with two bars per label.

    Args:
        title: the title.
        unit: of the values.
        labels: of the places.
        values: two by name, one for each place.
        colours: of the names.
    """
    heights = [value for several in values.values() for value in several]
    figure, axes = _chart(title, unit, 1.5 * len(labels), heights)
    for side, ((name, several), colour) in enumerate(zip(values.items(), colours, strict=True)):
        places = [place + 0.4 * side - 0.2 for place in range(len(labels))]
        drawn = axes.bar(places, several, width=0.38, label=name, color=colour)
        axes.bar_label(drawn, labels=[_written(value, 3) for value in several], padding=2, fontsize="small")
    axes.set_xticks(range(len(labels)), labels)
    axes.legend(frameon=False)
    return figure


def growth(title: str, unit: str, sizes: Sequence[float], costs: Mapping[str, Sequence[float]]) -> Figure:
    """Return a chart of costs relative to the first size, on logarithmic axes, with lines for constant and for linear.

    Args:
        title: the title.
        unit: of the sizes.
        sizes: in ascending order.
        costs: by name, one for each size.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(unit)
    axes.set_ylabel("relative to the first size")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, values in costs.items():
        axes.plot(sizes, [value / values[0] for value in values], marker="o", label=name)
    for label, values in (("twice", [2.0, 2.0]), ("linear", [1.0, sizes[-1] / sizes[0]])):
        axes.plot([sizes[0], sizes[-1]], values, color=STOCK, linestyle=":", label=label)
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", ncols=2)
    return figure


def lines(
    title: str, axes_names: tuple[str, str], places: Sequence[str], values: Mapping[str, Sequence[float]]
) -> Figure:
    """Return a chart of one line by name over the same places, with a logarithmic axis of values.

    Args:
        title: the title.
        axes_names: of the places and of the values.
        places: labels, evenly spaced.
        values: by name, one for each place.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.set_yscale("log")
    for name, heights in values.items():
        axes.plot(range(len(places)), heights, marker="o", label=name, color=WOOLY if name == "wooly" else None)
    axes.set_xticks(range(len(places)), places)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", ncols=2)
    return figure


def _written(value: float, digits: int) -> str:
    """Return a value as it is written above its bar; zero stands for a value that was not measured."""
    if not value:
        return "n/a"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def _chart(title: str, unit: str, width: float, heights: Sequence[float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(max(4.8, 1.6 + width), 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.12 * max(heights) or 1)
    return figure, axes
