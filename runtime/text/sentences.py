"""Where sentences start in a stream of text.

Whether a sentence starts at a character is decided when that character is read, from it and from
a bounded stretch of the text before it. So a decision is there with the first token of the
sentence, does not depend on how the stream came in pieces, is never taken back, and costs the
same however long the sentence is. White space belongs to the sentence before.
"""

from __future__ import annotations

import re
import unicodedata

# What ends a sentence: stops that need white space after them, and those of scripts without it.
STOPS = ".!?…؟۔।॥"
WIDE_STOPS = "。！？｡．။።፧"
# Where a sentence that is too long may be cut in a script without white space.
WIDE_COMMAS = "，、；："
WIDE_CLOSERS = "」』）】》〉"
CLOSERS = "\"'”’»)]}*_`" + WIDE_CLOSERS
OPENERS = "\"'“‘«([{*_`「『（【《〈"
BULLETS = "•⁃‣◦▪●"
NO_GAP = CLOSERS + WIDE_STOPS + WIDE_COMMAS  # what follows them may start without a gap
NEVER_FIRST = ")]}»,;" + ".!?…" + WIDE_STOPS + WIDE_COMMAS + WIDE_CLOSERS
ZERO_WIDTH_JOINER = "\u200d"
LINE_BREAKS = "\n\r\u2028\u2029"

# Abbreviations that a sentence does not end with. Others may end one before a capital ("etc.").
NEVER_LAST = frozenset(
    "mr mrs ms mx dr prof rev hon sr st mt gen col capt lt sgt gov sen rep pres messrs mme mlle "
    "v vs e.g i.e eg ie a.k.a cf viz al".split()
)
# Words that are abbreviations only before a number ("No. 5", but "No. It is not.").
BEFORE_NUMBERS = frozenset(
    "no nos nr n° vol pp ch chap sec sect fig figs eq eqs art para ver approx ca "
    "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
# "U.S. Senate" or "U.S. The": one letter cannot tell, but half of all sentences begin with one of
# these four (the, he, in, what), and names behind an acronym seldom do.
COMMON_FIRST = "THIW"
WORDS_BEFORE_ACRONYM = 4  # "In the U.S." and "At 5 a.m." are openings, not yet sentences

# A text without stops is cut: from LONG characters on at white space or behind a wide comma, at
# LONGEST anywhere. A code block is one unit; only a very long one is cut, between two lines.
LONG, LONGEST = 400, 500
CODE_LONG, CODE_LONGEST = 4000, 5000

LOOKBEHIND = 64  # characters of the running sentence that the rules read
LINE_HEAD = 100  # characters of a line that tell whether it is a code fence

_LIST_MARK = re.compile(
    rf"(?:[#>*_+(\[{BULLETS}-] ?)*(?:\d{{1,3}}(?:\.\d{{1,3}})*|[A-Za-z]|[ivxIVX]{{2,5}})\."
)
_ACRONYM = re.compile(r"(?:[A-Za-z]{1,2}\.)+[A-Za-z]{1,2}")
_LAST_WORD = re.compile(r"[^ (\[{/—–]+$")
# "[...]" and " . . ." stand for words left out; four stops end the sentence as well.
_OMISSION = re.compile(r"[\[(](?:\.\.\.|…)$|(?<!\.) \. \. \.$")
_FENCE = re.compile(r"(?:(?:[-*+]|\d{1,3}[.)])\s+)*(`{3,}(?=[^`]*$)|~{3,})")


class SentenceSplitter:
    """Finds the starts of sentences in a stream.

    `feed` takes the next piece and returns the offsets, in characters from the beginning of the
    stream, at which sentences after the first one start.
    """

    def __init__(self) -> None:
        self._read = 0  # characters of the stream so far
        self._start = 0  # where the running sentence starts
        self._before = ""  # its end, each stretch of white space as one space, none at the end
        self._gap = False  # white space was read since
        self._broken = False  # a line break was read since
        self._line = ""  # the head of the running line
        self._fence = ""  # of the code block that the stream is in

    def feed(self, piece: str) -> list[int]:
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
        """Enters or leaves a fenced code block where the line says so."""
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
            return False  # most characters: they continue a word
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
    """Does a sentence begin with the character `following`, on the line of the one before?

    Args:
        before: the end of the running sentence, at most LOOKBEHIND characters; each stretch of
            white space is one space, and the last character is visible.
        gap: white space stands between the two.
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
    """Does the stop at the end of `core` belong to a list mark, an abbreviation or an initial?

    `whole`: `core` begins where the running sentence does.
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
    """Is the word before the last one capitalised? ("Albert I. Jones", but "you and I. Then")"""
    words = core.split(" ")
    return len(words) > 1 and words[-2][:1].isupper()


def _joins(before: str, character: str) -> bool:
    """Is `character` part of what is seen as one with the character before?"""
    skin_tone = "\U0001f3fb" <= character <= "\U0001f3ff"
    mark = unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")
    return before == ZERO_WIDTH_JOINER or skin_tone or mark
