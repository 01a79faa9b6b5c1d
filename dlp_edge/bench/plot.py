"""The measurements as a picture: time per token of each case, over that of the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlp_edge.errors import UsageError


def draw(document: dict[str, Any], path: Path) -> None:
    """Draws what `measure` returned; the ending of the path chooses the format.

    Raises:
        UsageError: matplotlib is not there, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "a plot needs matplotlib", "pip install matplotlib, or leave --plot out"
        ) from error
    cases = document["cases"]
    names = list(cases)
    figure = Figure(figsize=(7, 0.45 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        rounds = cases[name]["rounds_ms_per_token"]
        axes.plot(rounds, [row] * len(rounds), "|", color="tab:grey", markersize=12)
        axes.plot([sorted(rounds)[len(rounds) // 2]], [row], "o", color="tab:blue")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("ms a token, routing and switching included (every round, and the median)")
    axes.set_title(
        f"{document['backbone']}, {document['quantisation']}, {document['device']}", fontsize=10
    )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be written ({error})", "Choose another file") from error
