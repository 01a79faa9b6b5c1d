"""Plots of an evaluation as PNG bytes; no display needed."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = {"base": "#9aa0a6", "single": "#4c8bf5", "multi": "#b07cc6", "dlp": "#e8710a"}
_DPI = 110


def plot_scores(document: dict[str, Any]) -> bytes:
    """Bar chart of scores by task and system, with confidence intervals."""
    tasks, systems = document["tasks"], document["systems"]
    figure = Figure(figsize=(max(6.0, 1.1 * len(tasks) + 1.5), 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        for place, task in enumerate(tasks):
            found = task["systems"][system]
            if found is None:
                continue
            value, low, high = (100 * found["score"][end] for end in ("value", "low", "high"))
            axes.bar(
                place + (index - (len(systems) - 1) / 2) * width,
                value,
                width,
                color=COLOURS[system],
                yerr=[[value - low], [high - value]],
                error_kw={"lw": 0.8, "ecolor": "#444"},
                label=system if place == 0 else None,
            )
    axes.set_xticks(range(len(tasks)), [task["name"] for task in tasks], rotation=30, ha="right")
    axes.set_ylabel("score (%)")
    axes.set_ylim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.bar(0, 0, color=COLOURS[system]) for system in systems]
    axes.legend(handles, systems, ncols=len(systems), frameon=False, loc="upper left",
                bbox_to_anchor=(0, 1.12))  # fmt: skip
    return _png(figure)


def plot_time(document: dict[str, Any]) -> bytes:
    """Average score against relative time; small points are variants of the sweep."""
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    average = document["averages"]["all"]["systems"]
    for place, system in enumerate(document["systems"]):
        _point(axes, average[system], system, COLOURS[system], 90, place)
    variants = document.get("sweep", {})
    for name, found in variants.items():
        if name != "dlp":
            _point(axes, found, name, "#f3b27a", 25)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("time / base, same prompt and number of new tokens")
    axes.set_ylabel("average score (%)")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _point(
    axes: Any, found: dict[str, Any], name: str, colour: str, size: float, place: int = 0
) -> None:
    """Draw a system's point; `place` offsets its label, so that labels of equal points differ."""
    if found["score"] is None or found["time_ratio"] is None:
        return
    x, y = found["time_ratio"]["value"], 100 * found["score"]["value"]
    axes.scatter([x], [y], s=size, color=colour, zorder=3)
    axes.annotate(name, (x, y), xytext=(7, 5 - 11 * place), textcoords="offset points", fontsize=8)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
