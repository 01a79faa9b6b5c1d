"""What was found, as ratios over one engine, as tables and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

RIVAL, EXACT = "llama.cpp", "transformers + PEFT"
Found = Mapping[str, Mapping[str, Any]]  # what `Match.play` returns
Spread = dict[str, float]
# Title, what was measured, and in which case (None: it has none).
Column = tuple[str, str, str | None]


def columns(found: Found) -> list[Column]:
    """All that was measured of any engine but its perplexity."""
    cases = {case: None for own in found.values() for case in own["decode_ms"]}
    return [
        *((f"decode, {case}", "decode_ms", case) for case in cases),
        ("prefill, short", "prefill_ms", "base"),
        ("prefill, long", "long_prefill_ms", "base"),
        ("start", "start_s", None),
        ("peak memory", "peak_bytes", None),
    ]


def values(own: Mapping[str, Any], column: Column) -> list[float]:
    """An engine's values of a column, one of each round; empty where it has none."""
    _, key, case = column
    found: list[float] = own[key] if case is None else own[key].get(case, [])
    return found


def round_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Median, least and most of the ratios within each round that both took part in."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=False)]
    return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}


def summarise(found: Found) -> dict[str, dict[str, Any]]:
    """For each engine its ratios, by the titles of the columns: how many times as fast as RIVAL;
    of memory, how many times as much; and `perplexity` by case, over that of EXACT."""
    return {
        name: {"perplexity": dict(_perplexities(own, found.get(EXACT)))}
        | dict(_ratios(own, found.get(RIVAL), columns(found)))
        for name, own in found.items()
    }


def _ratios(
    own: Mapping[str, Any], rival: Mapping[str, Any] | None, wanted: Sequence[Column]
) -> Iterator[tuple[str, Spread]]:
    for column in wanted:
        ours, theirs = values(own, column), values(rival, column) if rival else []
        if ours and theirs:
            more = column[1] == "peak_bytes"
            yield column[0], round_ratio(ours, theirs) if more else round_ratio(theirs, ours)


def _perplexities(
    own: Mapping[str, Any], exact: Mapping[str, Any] | None
) -> Iterator[tuple[str, float]]:
    for case, loss in own["loss"].items():
        if exact is not None and case in exact["loss"]:
            yield case, math.exp(loss - exact["loss"][case])


def print_tables(document: Mapping[str, Any]) -> None:
    """Prints medians, ratios and perplexities as tables in Markdown."""
    found, ratios = document["engines"], document["ratios"]
    wanted = columns(found)
    titles = [title for title, _, _ in wanted]
    print(
        f"Medians of {document['rounds']} rounds: ms a token, ms a prompt, s, MB "
        f"({document['processor']}, {document['threads']} threads; others worked on the machine "
        f"during {document['disturbed']:.0%} of the measurements)\n"
    )
    _print_head("engine", titles)
    for name, own in found.items():
        _print_row(name, [_median(values(own, column), column[1]) for column in wanted])
    print(f"\nTimes as fast as {RIVAL} (memory: times as much), and the spread over the rounds\n")
    _print_head("engine", titles)
    for name, own in ratios.items():
        _print_row(name, [_spread(own.get(title)) for title in titles])
    print(f"\nPerplexity over that of {EXACT}, fp32\n")
    cases = list(document["cases"])
    _print_head("engine", cases)
    for name, own in ratios.items():
        own = own["perplexity"]
        _print_row(name, [f"{own[case]:.4f}" if case in own else "-" for case in cases])


def _print_head(first: str, titles: Sequence[str]) -> None:
    print(f"| {first} | {' | '.join(titles)} |\n{'|---' * (len(titles) + 1)}|")


def _print_row(name: str, cells: Sequence[str]) -> None:
    print(f"| {name} | {' | '.join(cells)} |")


def _median(found: Sequence[float], key: str) -> str:
    if not found:
        return "-"
    if key == "peak_bytes":
        return f"{median(found) / 1e6:.0f}"
    return f"{median(found):.{2 if key == 'decode_ms' or key == 'start_s' else 0}f}"


def _spread(ratio: Spread | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draws the ratios, a panel for each column; bars whose base perplexity is more than 1.02 of
    EXACT's are hatched."""
    from matplotlib.figure import Figure

    ratios = document["ratios"]
    titles = [title for title, _, _ in columns(document["engines"])]
    names = list(ratios)
    figure = Figure(figsize=(13, 0.5 * len(names) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True)
    for title, axes in zip(titles, panels, strict=True):
        for row, name in enumerate(names):
            if title not in ratios[name]:
                continue
            spread = ratios[name][title]
            lossy = ratios[name]["perplexity"].get("base", 1.0) > 1.02
            axes.barh(
                row,
                spread["median"],
                xerr=[
                    [spread["median"] - spread["least"]],
                    [spread["most"] - spread["median"]],
                ],
                color="tab:blue" if name.startswith("dlp-edge") else "tab:grey",
                hatch="///" if lossy else None,
                edgecolor="white",
                ecolor="0.3",
            )
            axes.text(spread["most"], row, f" {spread['median']:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="tab:red", linewidth=0.8)
        axes.margins(x=0.35)  # room for the numbers
        axes.set_title(title.replace(", ", ",\n", 1), fontsize=9)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel(
        f"times as fast as {RIVAL} (memory: times as much); hatched: perplexity over 1.02",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
