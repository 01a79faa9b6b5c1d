"""Long documents, such as people paste to have something done with them: pages of a manual, code,
and what the packages of this environment say of themselves."""

from __future__ import annotations

import pydoc_data.topics
import random
import sysconfig
from functools import cache
from importlib import metadata, resources
from pathlib import Path

SHORTEST, LONGEST = 300, 6000  # characters
SOURCE_SHARE = 0.25  # code; the rest is prose, with lists, tables and examples


def draw_document(rng: random.Random, longest: int = LONGEST) -> str:
    """Some lines in a row of a document."""
    text = rng.choice(_sources() if rng.random() < SOURCE_SHARE else _pages())
    length = round(SHORTEST * (longest / SHORTEST) ** rng.random())
    start = text.rfind("\n", 0, rng.randrange(max(1, len(text) - length))) + 1
    end = text.rfind("\n", start + 1, start + length)
    return text[start : end if end > start else start + length].strip()


def python_modules() -> list[Path]:
    """The package's own and, where they lie there as files, the standard library's."""
    return [
        *Path(str(resources.files("dlp_edge.models"))).glob("*.py"),
        *Path(sysconfig.get_path("stdlib")).glob("*.py"),
    ]


@cache
def _sources() -> tuple[str, ...]:
    found = (path.read_text("utf-8", "replace") for path in sorted(python_modules()))
    return tuple(text for text in found if len(text) > SHORTEST)


@cache
def _pages() -> tuple[str, ...]:
    """The pages of Python's manual, and the descriptions of installed packages."""
    pages = [page for _, page in sorted(pydoc_data.topics.topics.items())]
    described = (package.read_text("METADATA") or "" for package in metadata.distributions())
    pages += sorted({text.partition("\n\n")[2] for text in described})  # after the headers
    return tuple(page for page in pages if len(page) > SHORTEST)
