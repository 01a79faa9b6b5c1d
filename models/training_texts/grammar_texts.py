"""Sentences and requests made of a grammar: everyday text of more kinds than anybody could list.

`grammar.txt` holds the grammar: sections of words, and sentences with {slots} for them.
"""

from __future__ import annotations

import random
import re
from functools import cache
from importlib import resources

SMALL_TALK = ("greetings", "thanks", "farewells", "replies_short", "about_you", "chatter")
WHOLE = ("sentences", "requests", "records", "foreign", "tasks", *SMALL_TALK)
_SLOT = re.compile(r"{(\w+)}")


@cache
def grammar() -> dict[str, tuple[str, ...]]:
    """What may stand in a slot, by its name; those of WHOLE are whole texts."""
    content = (
        resources.files("dlp_edge.models.training_texts").joinpath("grammar.txt").read_text("utf-8")
    )
    found: dict[str, tuple[str, ...]] = {}
    for section in content.split("\n== "):
        name, _, body = section.removeprefix("== ").strip("\n").partition("\n")
        found[name] = tuple(body.split("\n") if name in WHOLE else body.split(" / "))
    return found


def from_grammar(kind: str, rng: random.Random) -> str:
    """A text of one of the kinds in WHOLE."""
    rules = grammar()
    text = _SLOT.sub(lambda slot: rng.choice(rules[slot[1]]), rng.choice(rules[kind]))
    return text.replace("\\n", "\n")
