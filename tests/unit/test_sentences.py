"""Sentence starts in a stream."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlp_edge.runtime.text.sentences import CODE_LONGEST, LONG, LONGEST, SentenceSplitter
from tests.testing.paths import DATA

GOLDEN = json.loads((DATA / "golden_rules.json").read_text("utf-8"))
# What one character of lookahead cannot tell: a list in one line without stops ("1. Take 2 eggs"
# has the same beginning), and dots that open a sentence.
NOT_REACHED = {
    "List (period followed by parens and no period to end item)",
    "List (parens and no period to end item)",
    "List (period to mark list and no period to end item)",
    "Alphabetical list",
    "4-dot ellipsis",
}


def split(text: str, pieces: list[str] | None = None) -> list[str]:
    splitter = SentenceSplitter()
    starts = [0]
    for piece in [text] if pieces is None else pieces:
        starts += splitter.feed(piece)
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def test_golden_rules() -> None:
    """43 of the 48 English golden rules; the five others by name."""
    failed = {
        rule["name"]
        for rule in GOLDEN["rules"]
        if [sentence.strip() for sentence in split(rule["text"])] != rule["sentences"]
    }
    assert failed == NOT_REACHED
    assert (len(GOLDEN["rules"]), len(failed)) == (48, 5)


@pytest.mark.parametrize(
    "marked",
    [
        "One. |Two! |Three? |Four",
        "no stop at all",
        "hello. lower case goes on",
        # numbers, abbreviations, initials
        "It costs 3.5 euros. |Fine. |3 are left.",
        "Dr. Smith met J. K. Rowling. |They spoke.",
        "No. |It is in vol. 3, Fig. 2, No. 5 and on p. 7. |Really.",
        "Rice, e.g. Basmati, etc. and more. |Rice, beans, etc. |Then we eat.",
        "He left in Jan. |On Dec. 5 he was back.",
        "They fought in World War I. |The other was worse.",
        "I CAN'T. |Then go.",
        "In the U.S. Congress met. |Nobody in the U.S. |The rest slept.",
        "The book is by J.R.R. Martin. |It is long.",
        # ellipses
        "Well... |And so on. |Wait… |What? wait… what?",
        "He said [...] Nothing . . . Much.",
        # quotes and brackets after the stop
        'He said "Yes!" |Then he left.',
        'He said "Yes!" and left.',
        "(Really?) |Yes. |[Sure.] |“Good.” |‘Bye.’ |*So.* |**There.** |`x.` |End",
        "« Oui ! » |Il partit.",
        "He ate (two or three.) |“Why?” |(Who knows.)",
        # lists, headings and line breaks
        "First line\n|Second line\r\n\r\n|Third\u2028|fourth",
        "1. One thing\n|2. Another. |More\n|10.) Ten\n|(a.) A\n|iv. Four\n|1.2. Part",
        "- One. |Two\n|* Three\n  |- nested\n|+ plus",
        "• One |• Two",
        "# Heading\n\n|## 1. Introduction\n|**2. Title** Text. |More",
        # scripts with other stops
        "你好。|今天天气很好！|是吗？|“好。”|他走了。",
        "彼は「はい。」|と言った。|３．１４です．|次",
        "走吧！”，他说。",
        "नमस्ते। |आप कैसे हैं? |مرحبا؟ |نعم.",
        # code
        "See:\n|```python\nx = 1. \n# A. B\n\nprint(x)\n```\n|Done. |Yes",
        "```\nA. B\n~~~\nC\n````\n|After",
        "~~~\nA. B\n```\nC\n~~~\n|After",
        "1. Run:\n   |```sh\n   ls. A\n   ```\n|2. Next",
        "> ```\n> A. B\n> ```\n|After",
        "```inline``` code. |Then\n|more",
        "```\nA. B\nis never closed. \nC",
    ],
)
def test_examples(marked: str) -> None:
    assert "|".join(split(marked.replace("|", ""))) == marked


FRAGMENTS = (
    "a A I 1 12 word Word Dr. U.S. e.g. No. p.m. J. a. 1. 1.) iv. 3.14 . ! ? … ... ?! \" ' ( ) [ ] "
    "“ ” « » * _ ` ``` ~~~ ```py > # - • , ; : 。 ！ ？ ． ， 「 」 你好 ３ आप । é "
    "😀 👩\u200d💻 e\u0301"
).split()
SPACES = (" ", " ", " ", "  ", "\n", "\r\n", "\xa0", "\u3000")
fragments = st.sampled_from([*FRAGMENTS, *SPACES])
texts = st.text(max_size=80) | st.lists(fragments, max_size=40).map("".join)
# Long enough to be cut: fragments, each many times.
long_texts = st.lists(st.tuples(fragments, st.integers(1, 700)), min_size=1, max_size=8).map(
    lambda runs: "".join(fragment * count for fragment, count in runs)
)


@given(texts | long_texts, st.data())
@settings(deadline=None)
def test_chunking_never_changes_a_decision(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(text, pieces) == split(text) == split(text, list(text))


@given(texts | long_texts)
@settings(deadline=None)
def test_a_start_is_told_with_its_first_character_and_never_taken_back(text: str) -> None:
    """Character by character, `feed` says either nothing or "here": no start comes late."""
    splitter = SentenceSplitter()
    starts = []
    for at, character in enumerate(text):
        found = splitter.feed(character)
        assert found in ([], [at])
        starts += found
    assert starts == SentenceSplitter().feed(text)


@given(texts | long_texts)
@settings(deadline=None)
def test_sentences_begin_visibly_and_lose_nothing(text: str) -> None:
    starts = SentenceSplitter().feed(text)
    assert starts == sorted(set(starts))
    assert all(0 < start < len(text) for start in starts)
    sentences = split(text)
    assert "".join(sentences) == text
    assert all(sentence[:1].strip() for sentence in sentences[1:])
    assert not sentences[1:] or sentences[0].strip()


@given(long_texts)
@settings(deadline=None)
def test_no_sentence_is_longer_than_the_cap(text: str) -> None:
    limit = CODE_LONGEST if "```" in text or "~~~" in text else LONGEST
    for sentence in split(text):
        # The rest of what is seen as one character may follow.
        assert len(sentence.strip()) <= limit + 2


@pytest.mark.parametrize(
    ("word", "longest"),
    [
        ("word ", LONG),  # cut at white space
        ("今天天气很好，", LONG + 7),  # behind a comma
        ("今天", LONGEST),
        ("=", LONGEST),
    ],
)
def test_text_without_stops_is_cut_at_the_cap(word: str, longest: int) -> None:
    sentences = split(word * 2000)
    assert {len(sentence) for sentence in sentences[:-1]} <= set(range(LONG, longest + 1))
    assert all(sentence.startswith(word[0]) for sentence in sentences)


def test_the_cap_tears_no_character() -> None:
    for shape in ("👩\u200d💻", "e\u0301", "👍\U0001f3fd", "❤\ufe0f"):
        sentences = split("x" + shape * 1000)
        assert len(sentences) > 1
        assert all(sentence.startswith(shape) for sentence in sentences[1:])


code_lines = st.lists(
    st.text(alphabet="aB1. !?()\"'#-=。", max_size=30).filter(str.isprintable), max_size=20
)


@given(code_lines, st.sampled_from(["```", "````", "~~~"]), st.sampled_from(["", "py", " text"]))
@example(["", "# A. B", "```"], "````", "")
def test_a_fenced_code_block_is_one_sentence(lines: list[str], fence: str, info: str) -> None:
    block = "\n".join([fence + info, *lines, fence]) + "\n"
    assert split(f"Look: this.\n{block}Done. Yes.") == ["Look: this.\n", block, "Done. ", "Yes."]


def test_a_very_long_code_block_is_cut_between_lines() -> None:
    line = "x = f(1. , 2)\n"
    sentences = split("```\n" + line * 1000 + "```\n")
    assert len(sentences) > 1
    assert all(sentence.startswith(line) for sentence in sentences[1:-1])


@given(long_texts)
@settings(deadline=None)
def test_memory_is_bounded(text: str) -> None:
    """The work for a character is on what is kept: it cannot grow with the text."""
    splitter = SentenceSplitter()
    splitter.feed(text)
    assert len(pickle.dumps(splitter)) < 2000
