"""Colours of a terminal: names for what dlp-edge says, and a tint for every adapter."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

# "Select graphic rendition" parameters.
COLOURS = {"red": "31", "green": "32", "grey": "90"}
_FIRST = ("36", "33", "35", "32", "34", "31")  # in the terminal's own theme
_NEXT = ("38;5;208", "38;5;141", "38;5;138", "38;5;67")  # orange, lilac, rose, slate
_STRIDE = 37  # apart in the list of the others, so that neighbours differ
_STYLES = ("", "4;", "1;", "1;4;", "3;", "3;4;", "1;3;", "1;3;4;")


def _of_the_cube() -> list[str]:
    """Those of the 256 colours that are legible on black and on white."""
    light = {
        16 + 36 * red + 6 * green + blue: 0.3 * red + 0.59 * green + 0.11 * blue
        for red, green, blue in product(range(6), repeat=3)
        if max(red, green, blue) - min(red, green, blue) >= 2  # no greys
    }
    return [f"38;5;{number}" for number, value in light.items() if 1.2 <= value <= 3.6]


def tints_of(names: Iterable[str]) -> dict[str, str]:
    """Adapter name -> the tint of its sentences; no two are the same."""
    others = [tint for tint in _of_the_cube() if tint not in _NEXT]
    spread = [others[i * _STRIDE % len(others)] for i in range(len(others))]
    tints = (style + tint for style in _STYLES for tint in (*_FIRST, *_NEXT, *spread))
    return dict(zip(names, tints, strict=False))
