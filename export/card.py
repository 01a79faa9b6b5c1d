"""The report of an export as a model card: README.md with a picture, beside the bundle.

Not in the bundle: its folder holds nothing but the files that the manifest lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PICTURE = "export.png"
_COLOR, _MARK = "#4878a8", "#c44e52"


def write_card(report: Mapping[str, Any], folder: Path) -> None:
    """Write README.md and its picture.

    Args:
        report: the content of a bundle's `report.json`.
        folder: created if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(_text(report), encoding="utf-8")
    _draw(report, folder / PICTURE)


def _text(report: Mapping[str, Any]) -> str:
    perplexity, base = report["perplexity"], report["parity"]["base"]
    rows = [
        ("backbone", report["backbone"]),
        ("weights", f"{report['quantisation']}, for {report['target']}"),
        ("size", f"{sum(report['bytes'].values()) / 1e6:.0f} MB"),
        (
            "perplexity",
            f"{perplexity['bundle']:.2f}, the source's is {perplexity['source']:.2f} "
            f"({perplexity['tokens']} tokens)",
        ),
        ("same most probable token", f"{base['greedy_agreement']:.1%}"),
    ]
    if "greedy" in report:
        greedy = report["greedy"]
        rows.append(
            (
                "greedy answers",
                f"{greedy['agreement']:.1%} of {greedy['prompts']} x {greedy['tokens']} tokens are "
                "the source's choice",
            )
        )
    if "milliseconds_per_token" in report:
        rows.append(
            ("a token, where it was exported", f"{report['milliseconds_per_token']:.1f} ms")
        )
    lines = [
        f"# {report['backbone']}, a dlp-edge bundle",
        "",
        f"The result is {report['verdict']}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f"![size by part, perplexity and agreement]({PICTURE})",
        "",
        "## Adapters",
        "",
    ]
    if report["adapters"]:
        lines += ["| name | rank | target modules | trained on |", "|---|---|---|---|"]
    else:
        lines.append("None: this is the backbone alone.")
    lines += [
        f"| {adapter['name']} | {adapter['rank']} | {', '.join(adapter['target_modules'])} "
        f"| {adapter['base_model'] or 'not stated'} |"
        for adapter in report["adapters"]
    ]
    lines += ["", "## Use", "", "    dlp-edge run BUNDLE PROMPT", ""]
    lines += [f"Note: {remark}." for remark in report["remarks"]]
    return "\n".join(lines).rstrip() + "\n"


def _draw(report: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    sizes, losses, agreement = figure.subplots(1, 3)
    parts = sorted(report["bytes"].items(), key=lambda item: int(item[1]))
    sizes.barh([name for name, _ in parts], [size / 1e6 for _, size in parts], color=_COLOR)
    sizes.set_xlabel("MB")
    perplexity = report["perplexity"]
    losses.bar(
        ["source", "bundle"], [perplexity["source"], perplexity["bundle"]], color=[_MARK, _COLOR]
    )
    losses.set_ylabel("perplexity")
    shares = {"given text": report["parity"]["base"]["greedy_agreement"]}
    if "greedy" in report:
        shares["own answers"] = report["greedy"]["agreement"]
    agreement.bar(list(shares), [100 * share for share in shares.values()], color=_COLOR)
    agreement.set_ylim(0, 100)
    agreement.set_ylabel("% of tokens as the source")
    figure.savefig(path, dpi=110)
