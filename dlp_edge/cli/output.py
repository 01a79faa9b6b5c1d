"""What the command line shows: JSON, colours on a terminal only, sentences with their fusion."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, TextIO
from unicodedata import category

from dlp_edge.errors import DlpEdgeError
from dlp_edge.types import Chunk, Reply

COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36, "grey": 90}
_TINTS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_LABEL_WIDTH = 24


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=1, ensure_ascii=False))


def note(text: str) -> None:
    """A remark beside the data, on stderr."""
    print(text, file=sys.stderr)


def show_status(text: str) -> None:
    """A line on stderr that the next one is written over; "" wipes it."""
    print(f"\r{text:<30}\r", end="", file=sys.stderr, flush=True)


def print_error(error: DlpEdgeError) -> None:
    """One line on stderr."""
    print(f"{paint('error:', 'red', sys.stderr)} {error}", file=sys.stderr)


def paint(text: str, colour: str, stream: TextIO) -> str:
    """The text in a colour, if the stream is a terminal that wants colours."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


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


def tints_of(names: Iterable[str]) -> dict[str, str]:
    """Adapter name -> the colour of its sentences."""
    return {name: _TINTS[i % len(_TINTS)] for i, name in enumerate(names)}


def print_sentences(chunks: Iterable[Chunk], names: Iterable[str]) -> None:
    """Streams an answer, a line per sentence, each behind the fusion that writes it and in the
    colour of its strongest adapter."""
    tints = tints_of(names)
    sentence = -1
    indent = "\n" + " " * _LABEL_WIDTH + "│ "
    pending = ""  # white space at a sentence's end is not shown
    for chunk in chunks:
        strongest = max(chunk.fusion, key=lambda name: chunk.fusion[name], default="")
        tint = tints.get(strongest, "grey")
        if chunk.sentence != sentence:
            label = fusion_label(chunk.fusion)
            lead = "" if sentence < 0 else "\n"
            print(lead + paint(f"{label:<{_LABEL_WIDTH}}│ ", tint, sys.stdout), end="")
            sentence, pending = chunk.sentence, ""
        text = pending + chunk.text
        shown = text.rstrip()
        pending = text[len(shown) :]
        shown = printable(shown, sys.stdout).replace("\n", indent)
        print(paint(shown, tint, sys.stdout), end="", flush=True)
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
