"""Draw a case study as in the paper's figure 3: one prompt with several questions, the answer
sentence by sentence, and the adapters and weights that wrote each.

    python recipes/case_study.py BUNDLE "First question? Second question? Third?" -o case.png

The picture is made of one real answer of the bundle, greedy; `--json FILE` keeps its figures.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dlp_edge import Reply, Runtime, Sentence

COLOURS = "#4c8bf5 #e8710a #34a853 #b07cc6 #d93025 #12a4af #c5a100 #8d6e63 #e377c2 #607d8b".split()
BASE = "#9aa0a6"  # written by no adapter
COLUMNS = 78  # characters of text a line
LINE = 0.2  # inches
BAR = 1.9  # inches, of weight 1
TEXT = 7.2  # inches
GAP = 0.12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("case_study.png"))
    parser.add_argument("--json", type=Path, help="also write the answer's figures here")
    parser.add_argument("--kv", choices=("keep", "recompute"), default="keep")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    with Runtime(arguments.bundle) as runtime:
        reply = runtime.generate(
            arguments.prompt, max_new_tokens=arguments.max_new_tokens, kv=arguments.kv
        )
        names = [adapter.name for adapter in runtime.adapters]
    figure = draw(arguments.prompt, reply, names)
    figure.savefig(arguments.output, dpi=150)
    if arguments.json:
        document = {"prompt": arguments.prompt, **asdict(reply)}
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        arguments.json.write_text(text, encoding="utf-8")
    print(arguments.output)


def draw(prompt: str, reply: Reply, names: Sequence[str]) -> Figure:
    """The prompt, then a row for each sentence: its text, tinted by its adapters, and a bar of
    their weights."""
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    asked = _wrap(prompt)
    rows = [(sentence, _wrap(sentence.text)) for sentence in reply.sentences]
    heights = [LINE * len(lines) + GAP for lines in (asked, *(lines for _, lines in rows))]
    height = sum(heights) + GAP * len(rows) + 1.0
    width = TEXT + BAR + 1.7
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # inches from the top
    axes.axis("off")
    y = 0.2
    axes.add_patch(Rectangle((0.2, y), width - 0.4, heights[0], color="#f1f3f4", lw=0))
    _write(axes, asked, 0.35, y, style="italic")
    y += heights[0] + 2 * GAP
    for (sentence, lines), tall in zip(rows, heights[1:], strict=True):
        _draw_sentence(axes, sentence, lines, y, tall, colours)
        y += tall + GAP
    used = [name for name in names if any(name in s.fusion for s in reply.sentences)]
    handles: list[Any] = [Patch(color=colours[name], label=name) for name in used]
    if any(not sentence.fusion for sentence in reply.sentences):
        handles.append(Patch(color=BASE, label="base"))
    axes.legend(handles=handles, ncols=len(handles), loc="lower left", frameon=False, fontsize=9)
    return figure


def _draw_sentence(
    axes: Axes,
    sentence: Sentence,
    lines: Sequence[str],
    y: float,
    tall: float,
    colours: dict[str, str],
) -> None:
    fusion = sorted(sentence.fusion.items(), key=lambda item: -item[1]) or [("base", 1.0)]
    tint = colours.get(fusion[0][0], BASE)
    axes.add_patch(Rectangle((0.2, y), TEXT, tall, color=tint, alpha=0.16, lw=0))
    axes.add_patch(Rectangle((0.2, y), 0.06, tall, color=tint, lw=0))
    _write(axes, lines, 0.35, y)
    left = TEXT + 0.35
    middle = y + tall / 2
    for name, weight in fusion:
        colour = colours.get(name, BASE)
        axes.add_patch(Rectangle((left, middle - 0.08), BAR * weight, 0.16, color=colour, lw=0))
        left += BAR * weight
    label = "\n".join(f"{name} {100 * weight:.1f} %" for name, weight in fusion)
    axes.text(TEXT + BAR + 0.45, middle, label, va="center", fontsize=8)


def _wrap(text: str) -> list[str]:
    lines = [part for line in text.strip().split("\n") for part in textwrap.wrap(line, COLUMNS)]
    return lines or [""]


def _write(axes: Axes, lines: Sequence[str], x: float, y: float, style: str = "normal") -> None:
    for index, line in enumerate(lines):
        text = line.replace("$", r"\$")  # or matplotlib would set formulas
        top = y + GAP / 2 + LINE * (index + 0.5)
        axes.text(x, top, text, va="center", fontsize=9.5, family="DejaVu Sans", style=style)


if __name__ == "__main__":
    main()
