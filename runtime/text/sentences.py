"""Find sentence starts in a stream of text.

Whether a sentence starts at a character is decided when that character arrives, from it and a
bounded stretch of the text before it. The decision thus comes with the sentence's first token, does
not depend on how the stream is split into pieces, is never revised, and costs the same however long
the sentence is. White space belongs to the preceding sentence.
"""

from __future__ import annotations

import re
import unicodedata

# Sentence terminators: those that need white space after them, and those of scripts without it.
STOPS = ".!?…؟۔।॥"
WIDE_STOPS = "。！？｡．။።፧"
# Where an overlong sentence may be cut in a script without white space.
WIDE_COMMAS = "，、；："
WIDE_CLOSERS = "」』）】》〉"
CLOSERS = "\"'”’»)]}*_`" + WIDE_CLOSERS
OPENERS = "\"'“‘«([{*_`「『（【《〈"
BULLETS = "•⁃‣◦▪●"
NO_GAP = CLOSERS + WIDE_STOPS + WIDE_COMMAS  # a sentence may follow these without white space
NEVER_FIRST = ")]}»,;" + ".!?…" + WIDE_STOPS + WIDE_COMMAS + WIDE_CLOSERS
ZERO_WIDTH_JOINER = "\u200d"
LINE_BREAKS = "\n\r\u2028\u2029"

# Abbreviations that never end a sentence. Others may, before a capital ("etc.").
NEVER_LAST = frozenset(
    "mr mrs ms mx dr prof rev hon sr st mt gen col capt lt sgt gov sen rep pres messrs mme mlle "
    "v vs e.g i.e eg ie a.k.a cf viz al".split()
)
# Abbreviations only before a number ("No. 5", but "No. It is not.").
BEFORE_NUMBERS = frozenset(
    "no nos nr n° vol pp ch chap sec sect fig figs eq eqs art para ver approx ca "
    "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
# "U.S. Senate" or "U.S. The": one letter cannot tell, but half of all sentences start with one of
# these four (the, he, in, what), and names after an acronym seldom do.
COMMON_FIRST = "THIW"
WORDS_BEFORE_ACRONYM = 4  # "In the U.S." and "At 5 a.m." are no sentences yet

# Text without terminators is cut: from LONG characters at white space or after a wide comma, at
# LONGEST anywhere. A code block is one sentence; only a very long one is cut, between two lines.
LONG, LONGEST = 400, 500
CODE_LONG, CODE_LONGEST = 4000, 5000

LOOKBEHIND = 64  # characters of the current sentence that the rules read
LINE_HEAD = 100  # characters of a line that are checked for a code fence

_LIST_MARK = re.compile(
    rf"(?:[#>*_+(\[{BULLETS}-] ?)*(?:\d{{1,3}}(?:\.\d{{1,3}})*|[A-Za-z]|[ivxIVX]{{2,5}})\."
)
_ACRONYM = re.compile(r"(?:[A-Za-z]{1,2}\.)+[A-Za-z]{1,2}")
_LAST_WORD = re.compile(r"[^ (\[{/—–]+$")
# "[...]" and " . . ." mark an omission; a fourth stop ends the sentence.
_OMISSION = re.compile(r"[\[(](?:\.\.\.|…)$|(?<!\.) \. \. \.$")
_FENCE = re.compile(r"(?:(?:[-*+]|\d{1,3}[.)])\s+)*(`{3,}(?=[^`]*$)|~{3,})")


class SentenceSplitter:
    """Finds sentence starts in a stream."""

    def __init__(self) -> None:
        self._read = 0  # characters of the stream so far
        self._start = 0  # of the current sentence
        self._before = ""  # its last characters; runs of white space are one space, none at the end
        self._gap = False  # white space followed
        self._broken = False  # a line break followed
        self._line = ""  # the start of the current line
        self._fence = ""  # of the current code block; "" outside

    def feed(self, piece: str) -> list[int]:
        """Read the next piece.

        Returns:
            Offsets, in characters from the start of the stream, at which new sentences start; the
            first sentence's start is not reported.
        """
        starts: list[int] = []
        for character in piece:
            if len(self._line) < LINE_HEAD:
                self._line += character
            if character in LINE_BREAKS:
                self._end_line()
            elif character.isspace():
                self._gap = True
            else:
                if self._before and self._is_start(character):
                    starts.append(self._read)
                    self._start, self._before = self._read, ""
                elif self._gap and self._before:
                    self._before += " "
                self._before = (self._before + character)[-LOOKBEHIND:]
                self._gap = self._broken = False
            self._read += 1
        return starts

    def _end_line(self) -> None:
        """Enter or leave a fenced code block if the finished line is a fence."""
        line = self._line.strip().lstrip("> ")
        if not self._fence:
            opened = _FENCE.match(line)
            self._fence = opened.group(1) if opened else ""
        elif line.startswith(self._fence) and not line.strip(self._fence[0]):
            self._fence = ""
        self._line = ""
        self._gap = self._broken = True

    def _is_start(self, character: str) -> bool:
        length = self._read - self._start
        if not self._gap and self._before[-1] not in NO_GAP and length < LONGEST:
            return False  # most characters continue a word
        if self._fence:
            return (self._broken and length >= CODE_LONG) or length >= CODE_LONGEST
        if self._broken:
            return True
        between = self._gap or self._before[-1] in WIDE_COMMAS
        if length >= LONG and between and character not in NEVER_FIRST:
            return True
        if length >= LONGEST and not _joins(self._before[-1], character):
            return True
        return _begins_sentence(self._before, self._gap, character)


def _begins_sentence(before: str, gap: bool, following: str) -> bool:
    """Whether a sentence starts with `following`, on the same line as the text before.

    Args:
        before: the end of the current sentence, at most LOOKBEHIND characters; runs of white space
            are one space, and the last character is visible.
        gap: white space separates the two.
        following: a visible character.
    """
    if following in NEVER_FIRST:
        return False
    if gap and following in BULLETS:
        return True
    core = before.rstrip(CLOSERS + " ")
    if not core:
        return False
    if core[-1] in WIDE_STOPS:
        decimal = core[-1] == "．" and following.isdigit()
        return not decimal and (gap or following not in CLOSERS)
    if core[-1] not in STOPS or not gap or following.islower() or _OMISSION.search(core):
        return False
    if core[-1] != "." or core[-2:-1] in (".", " ", ""):
        return True
    return not _is_inside(core, len(before) < LOOKBEHIND, following)


def _is_inside(core: str, whole: bool, following: str) -> bool:
    """Whether the full stop at the end of `core` belongs to a list mark, abbreviation or initial.

    Args:
        whole: `core` holds the whole current sentence.
    """
    if whole and _LIST_MARK.fullmatch(core):
        return True
    match = _LAST_WORD.search(core[:-1])
    word = match.group().lstrip(OPENERS) if match else ""
    lower = word.lower()
    if lower in NEVER_LAST:
        return True
    if lower in BEFORE_NUMBERS or (len(word) == 1 and word.islower()):
        return following.isdigit()
    if len(word) == 1 and word.isupper():
        return word != "I" or (_follows_name(core) and following not in COMMON_FIRST)
    if not _ACRONYM.fullmatch(word):
        return False
    if whole and core.count(" ") + 1 < WORDS_BEFORE_ACRONYM:
        return True
    return lower not in ("a.m", "p.m") and following not in COMMON_FIRST


def _follows_name(core: str) -> bool:
    """Whether the last word but one is capitalised ("Albert I. Jones", but "you and I. Then")."""
    words = core.split(" ")
    return len(words) > 1 and words[-2][:1].isupper()


def _joins(before: str, character: str) -> bool:
    """Whether `character` combines with the character before into one glyph."""
    skin_tone = "\U0001f3fb" <= character <= "\U0001f3ff"
    mark = unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")
    return before == ZERO_WIDTH_JOINER or skin_tone or mark
