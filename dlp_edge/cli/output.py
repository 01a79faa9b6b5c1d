"""What the command line shows: JSON, colours on a terminal only, sentences with their fusion."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from shutil import get_terminal_size
from typing import Any, TextIO
from unicodedata import category

from dlp_edge.cli.colours import COLOURS, tints_of
from dlp_edge.cli.wrapping import Wrapper
from dlp_edge.errors import DlpEdgeError
from dlp_edge.types import Chunk, Reply

_LABEL_WIDTH = 24
_BAR = "│ "
_status = ""  # what is shown
_WIDE_ENOUGH = 50  # columns; on a narrower terminal a label has a line of its own


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=1, ensure_ascii=False))


def note(text: str) -> None:
    """A remark beside the data, on stderr."""
    print(text, file=sys.stderr)


def show_status(text: str) -> None:
    """A line on stderr that the next one is written over; "" wipes it."""
    global _status
    if text == _status:  # as most steps of a file's checksum are
        return
    _status = text
    print(f"\r{text:<40}\r", end="", file=sys.stderr, flush=True)


def print_error(error: DlpEdgeError) -> None:
    """One line on stderr."""
    print(f"{paint('error:', 'red', sys.stderr)} {error}", file=sys.stderr)


def paint(text: str, colour: str, stream: TextIO) -> str:
    """The text in a colour of `COLOURS` or a tint, if the stream is a terminal that wants any."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{COLOURS.get(colour, colour)}m{text}\x1b[0m"


def printable(text: str, stream: TextIO) -> str:
    """The text without what would steer a terminal: a model can write escape sequences."""
    if not stream.isatty():
        return text
    return "".join("\ufffd" if category(c) == "Cc" and c not in "\n\t" else c for c in text)


def fusion_label(fusion: Mapping[str, float]) -> str:
    """`sql 0.60 + sums 0.40`, or `base`."""
    if not fusion:
        return "base"
    ordered = sorted(fusion.items(), key=lambda item: -item[1])
    return " + ".join(f"{name} {weight:.2f}" for name, weight in ordered)


def print_sentences(chunks: Iterable[Chunk], names: Iterable[str]) -> None:
    """Streams an answer, a line per sentence, each behind the fusion that writes it and in the
    colour of its strongest adapter. A terminal's lines are wrapped at words."""
    tints = tints_of(names)
    column: Wrapper | None = None
    sentence = -1
    for chunk in chunks:
        if chunk.sentence != sentence or column is None:
            if column is not None:
                column.finish()
                print()
            sentence = chunk.sentence
            strongest = max(chunk.fusion, key=lambda name: chunk.fusion[name], default="")
            column = _begin_sentence(fusion_label(chunk.fusion), tints.get(strongest, "grey"))
        column.feed(printable(chunk.text, sys.stdout))
        sys.stdout.flush()
    if column is not None:
        column.finish()
    print(flush=True)


def _begin_sentence(label: str, tint: str) -> Wrapper:
    """Shows who writes a sentence; returns where its text goes."""
    width = get_terminal_size().columns if sys.stdout.isatty() else math.inf
    indent = " " * _LABEL_WIDTH if width >= _WIDE_ENOUGH else ""
    label = f"{label:<{len(indent)}}"
    if len(label) > len(indent):  # on a line of its own
        label += "\n" + indent
    print(paint(label + _BAR, tint, sys.stdout), end="", flush=True)
    indent += _BAR

    def write(text: str) -> None:
        print(paint(text, tint, sys.stdout), end="")

    return Wrapper(write, indent, width - len(indent))


def print_text(chunks: Iterable[Chunk]) -> None:
    """Streams the answer's text alone."""
    for chunk in chunks:
        print(printable(chunk.text, sys.stdout), end="", flush=True)
    print(flush=True)


def print_speed(reply: Reply) -> None:
    """Token counts and rates of an answer, on stderr."""
    note(paint(speed_of(reply), "grey", sys.stderr))


def speed_of(reply: Reply) -> str:
    """Token counts and rates of an answer, in one line."""
    times, usage = reply.timings, reply.usage
    parts = [
        f"prompt {usage.prompt_tokens} tokens, {reply.prefill_rate:.0f}/s",
        f"answer {usage.completion_tokens} tokens, {times.decode_rate:.1f}/s",
        f"first token {times.first_token * 1e3:.0f} ms",
    ]
    if times.drafted:
        parts.append(f"drafts accepted {times.accepted} of {times.drafted}")
    if times.routings:
        each = times.router / times.routings * 1e3
        parts.append(f"routings {times.routings} ({each:.2f} ms each)")
    if times.switches:
        parts.append(f"switches {times.switches}")
    return " · ".join([*parts, reply.finish_reason])


def reply_document(reply: Reply) -> dict[str, Any]:
    """A reply as `--json` gives it."""
    rates = {
        "prefill_tokens_per_second": reply.prefill_rate,
        "decode_tokens_per_second": reply.timings.decode_rate,
    }
    return {**asdict(reply), "rates": rates}
