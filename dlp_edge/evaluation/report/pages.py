"""A report as a list of blocks, rendered as Markdown or HTML."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    """A table; columns after the first hold numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Quote:
    """Labelled texts, shown verbatim."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """An image: file name, PNG bytes and caption."""

    name: str
    png: bytes
    caption: str


Block = Heading | Text | Table | Quote | Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; }
dl { background: #f6f6f6; padding: .7rem 1rem; border-radius: .4rem; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; white-space: pre-wrap; }
img { max-width: 100%; } figcaption { color: #555; }
"""


def as_markdown(blocks: Sequence[Block]) -> str:
    """Render as Markdown; images are separate files."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """Render as one self-contained HTML file."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        f"</body></html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Figure):
        return f"![{block.caption}]({block.name})"
    if isinstance(block, Quote):
        return "\n".join(f"- **{label}**: {_code(text)}" for label, text in block.items)
    lines = [block.header, ["---", *["---:"] * (len(block.header) - 1)], *block.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _code(text: str) -> str:
    """Text as inline code; the double fence permits backticks."""
    return f"`` {' '.join(text.split()) or ' '} ``"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Figure):
        data = base64.b64encode(block.png).decode()
        return (
            f'<figure><img alt="{escape(block.caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(block.caption)}</figcaption></figure>"
        )
    if isinstance(block, Quote):
        items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in block.items)
        return f"<dl>{items}</dl>"
    head = "".join(f"<th>{escape(cell)}</th>" for cell in block.header)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in block.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>"
