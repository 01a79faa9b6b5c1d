"""Sentence starts in a stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlp_edge.runtime.sentences import SentenceSplitter


def split(text: str, pieces: list[str] | None = None) -> list[str]:
    splitter = SentenceSplitter()
    starts = [0]
    for piece in [text] if pieces is None else pieces:
        starts += splitter.feed(piece)
    return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It costs 3.5 euros. Fine.", ["It costs 3.5 euros.", "Fine."]),
        ("Dr. Smith met J. K. Rowling.", ["Dr. Smith met J. K. Rowling."]),
        ('He said "Yes!" Then he left.', ['He said "Yes!"', "Then he left."]),
        ("Well... And so on. etc. and more", ["Well...", "And so on. etc. and more"]),
        ("First line\nSecond line", ["First line", "Second line"]),
        ("1. One thing\n2. Another", ["1. One thing", "2. Another"]),
        ("你好。今天天气很好！是吗？", ["你好。", "今天天气很好！", "是吗？"]),
        ("no stop at all", ["no stop at all"]),
        ("(Really?) Yes.", ["(Really?)", "Yes."]),
        ("No. It is in vol. 3 and Fig. 2.", ["No.", "It is in vol. 3 and Fig. 2."]),
    ],
)
def test_examples(text: str, sentences: list[str]) -> None:
    assert split(text) == sentences


texts = st.text(alphabet='aAbI1. !?…。\n"()“”-x', max_size=60)


@given(texts, st.data())
def test_chunking_never_changes_a_decision(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(text, pieces) == split(text)


@given(texts)
def test_sentences_start_with_text_and_lose_nothing(text: str) -> None:
    splitter = SentenceSplitter()
    starts = splitter.feed(text)
    assert starts == sorted(set(starts))
    for start in starts:
        assert not text[start].isspace()
        assert start > 0
