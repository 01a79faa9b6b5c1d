"""The report of a training: a confusion table and two plots beside the router."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlp_edge.models.evaluation import Judged, calibration_error, confusions, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONFUSION = "confusion.csv"
RELIABILITY = "reliability.png"
OUT_OF_SCOPE = "out_of_scope.png"
POINTS = 200  # of a curve


def write_report(
    folder: Path,
    labels: Sequence[str],
    kinds: Mapping[str, Judged],
    foreign: Mapping[str, Judged],
) -> None:
    """Writes `confusion.csv` over all kinds together, `reliability.png` with a line for each, and
    `out_of_scope.png`: what each threshold keeps of the prompts and finds of foreign text.

    Kinds without examples are omitted.
    """
    kinds = {kind: found for kind, found in kinds.items() if len(found.labels)}
    table = np.zeros((len(labels), len(labels)), np.int64)
    for found in kinds.values():
        table += confusions(found, len(labels))
    with (folder / CONFUSION).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["right \\ chosen", *labels])
        writer.writerows([label, *row] for label, row in zip(labels, table.tolist(), strict=True))
    _plot_reliability(folder / RELIABILITY, kinds)
    _plot_out_of_scope(folder / OUT_OF_SCOPE, kinds["prompts"], foreign)


def _plot_out_of_scope(path: Path, prompts: Judged, foreign: Mapping[str, Judged]) -> None:
    figure, axes = _figure()
    kept = np.linspace(0.8, 1, POINTS)
    limits = np.quantile(prompts.confidence, 1 - kept)
    for kind, found in foreign.items():
        share = (found.confidence[None] < limits[:, None]).mean(1)
        axes.plot(kept, share, label=f"{kind} ({len(found.labels)})")
    axes.set(
        xlabel="prompts kept (dev)",
        ylabel="out-of-scope recall",
        xlim=(0.8, 1),
        ylim=(0, 1.02),
    )
    _save(path, figure, axes)


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _plot_reliability(path: Path, kinds: Mapping[str, Judged]) -> None:
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="calibrated")
    for kind, found in kinds.items():
        points = reliability(found.largest, found.hits)
        error = calibration_error(found.largest, found.hits)
        axes.plot(
            [confidence for _, confidence, _ in points],
            [accuracy for _, _, accuracy in points],
            marker="o",
            markersize=3,
            label=f"{kind}, error {error:.3f}",
        )
    axes.set(
        xlabel="probability of the chosen adapter",
        ylabel="accuracy",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    _save(path, figure, axes)


def _save(path: Path, figure: Figure, axes: Axes) -> None:
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})
