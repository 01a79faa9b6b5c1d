"""The request splitter's input: a prompt's token ids, where they lie, and what precedes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

GAPS = 4  # before a token: nothing, white space, a line break, an empty line


@dataclass(frozen=True)
class SplitterInput:
    """L tokens of a text.

    Attributes:
        ids: [L] int64.
        gaps: [L] int64, below GAPS.
        starts, ends: [L] int64, offsets in characters without the white space around a token.
    """

    ids: npt.NDArray[np.int64]
    gaps: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def splitter_input(text: str, encoding: Encoding) -> SplitterInput:
    """The input for a text that a tokenizer has encoded without special tokens."""
    ids, gaps, starts, ends = [], [], [], []
    before = 0
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        piece = text[start:end]
        start += len(piece) - len(piece.lstrip())
        end = max(start, end - (len(piece) - len(piece.rstrip())))
        if start == end:
            continue  # white space alone
        lines = text.count("\n", before, start)
        gaps.append(min(lines, 2) + 1 if lines else int(start > before))
        ids.append(token)
        starts.append(start)
        ends.append(end)
        before = end
    return SplitterInput(*(np.array(each, np.int64) for each in (ids, gaps, starts, ends)))
