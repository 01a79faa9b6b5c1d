"""Word wrap behind a hanging indent, and a colour for every adapter."""

from __future__ import annotations

import math
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlp_edge.cli.colours import tints_of
from dlp_edge.cli.wrapping import Wrapper, columns


def wrapped(*pieces: str, room: float = 20, indent: str = "  | ") -> str:
    shown: list[str] = []
    wrapper = Wrapper(shown.append, indent, room)
    for piece in pieces:
        wrapper.feed(piece)
    wrapper.finish()
    return "".join(shown)


def test_lines_break_at_words_and_hang() -> None:
    text = "The quick brown fox jumps over the lazy dog. "
    assert wrapped(text).split("\n") == [
        "The quick brown fox",
        "  | jumps over the lazy",
        "  | dog.",
    ]


def test_the_text_has_its_own_lines() -> None:
    assert wrapped("a\n\n  b\tc\n") == "a\n  | \n  |   b    c"


def test_a_long_word_is_cut() -> None:
    assert wrapped("see " + "x" * 25).split("\n") == ["see", "  | " + "x" * 20, "  | xxxxx"]


def test_wide_characters_take_two_columns_and_break_anywhere() -> None:
    assert columns("\u4f60a\u0301") == 3
    lines = wrapped("\u4f60" * 25).split("\n")
    assert [columns(line.removeprefix("  | ")) for line in lines] == [20, 20, 10]


def test_without_a_terminal_nothing_is_broken() -> None:
    assert wrapped("a long line " * 50, room=math.inf) == ("a long line " * 50).strip()


@given(st.lists(st.sampled_from(["word", "a", "longer-word", "."]), min_size=1), st.integers(8, 60))
def test_as_textwrap_does_it(words: list[str], room: int) -> None:
    text = " ".join(words)
    plain = textwrap.TextWrapper(
        room, break_on_hyphens=False, break_long_words=True, subsequent_indent=""
    )
    expected = plain.wrap(text)
    if max(map(len, words)) <= room:
        assert wrapped(text, room=room, indent="").split("\n") == expected


@given(st.text("ab \n", max_size=40), st.data())
def test_the_pieces_do_not_matter(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    assert wrapped(text[:cut], text[cut:]) == wrapped(text)


@pytest.mark.parametrize("count", [7, 100, 500])
def test_no_two_adapters_share_a_colour(count: int) -> None:
    tints = tints_of([f"skill-{i}" for i in range(count)])
    assert len(set(tints.values())) == len(tints) == count
