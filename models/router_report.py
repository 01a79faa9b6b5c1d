"""Reports on a trained router: a confusion matrix and a reliability diagram."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dlp_edge.models.evaluation import Judged, calibration_error, confusions, reliability

CONFUSION = "confusion.csv"
RELIABILITY = "reliability.png"


def write_report(folder: Path, labels: Sequence[str], kinds: Mapping[str, Judged]) -> None:
    """Write `confusion.csv` over all kinds and `reliability.png` with one curve per kind.

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
    _plot(folder / RELIABILITY, kinds)


def _plot(path: Path, kinds: Mapping[str, Judged]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})
