"""A backbone's input embeddings as the beginning of a router's.

What words mean need not be learned from a task's few examples: the backbone has a row for each of
its tokens. The rows are reduced to the router's width (PCA), and a piece of the router's tokenizer
begins as the mean of the tokens that spell it. Frequent words of the backbone's vocabulary become
pieces too, so that words which no training prompt holds still mean something.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from dlp_edge.errors import RouterError

WORDS = 10_000
_KEY = "embed_tokens.weight"
_WORD = re.compile(r"[^\W\d_]{2,}")
_WORD_STARTS = ("Ġ", "▁")  # byte-level BPE and SentencePiece mark the space before a word


class BackboneEmbeddings:
    """The embedding table of a backbone in Hugging Face's layout.

    Raises:
        RouterError: the folder has no tokenizer.json or no embedding table.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises plain Exception
            raise RouterError(
                f"the tokenizer in {folder} cannot be read ({error})", "Name a whole backbone"
            ) from error
        self._table = _read_table(folder)

    def words(self) -> list[str]:
        """The first WORDS whole words of the vocabulary; tokenizers list frequent ones first."""
        found: dict[str, None] = {}
        for token, index in sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if token.startswith(_WORD_STARTS) and len(found) < WORDS:
                text = self._tokenizer.decode([index]).strip()
                if _WORD.fullmatch(text):
                    found[text] = None
        return list(found)

    def pieces(self, tokenizer: Tokenizer, width: int, spread: float) -> Tensor:
        """The first rows of a router's embedding, one a piece of its tokenizer: [V, width].

        Args:
            spread: the standard deviation of the values.
        """
        size = tokenizer.get_vocab_size()
        texts = [(tokenizer.id_to_token(at) or "").replace("▁", " ") for at in range(size)]
        reduced = _principal(self._table, width)
        rows = torch.zeros(size, width)
        for at, spelt in enumerate(self._tokenizer.encode_batch(texts, add_special_tokens=False)):
            known = [token for token in spelt.ids if token < len(reduced)]
            if known:
                rows[at] = reduced[known].mean(0)
        return rows * (spread / rows.std().clamp(min=1e-6))


def _principal(table: Tensor, width: int) -> Tensor:
    """The rows in the directions of most variance, [n, width]; narrow tables are padded."""
    centred = table - table.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    reduced = centred @ directions[:, -width:]
    return torch.nn.functional.pad(reduced, (0, width - reduced.shape[1]))


def _read_table(folder: Path) -> Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (a file is no mapping)
                    if key.endswith(_KEY):
                        return file.get_tensor(key).float()
        except (SafetensorError, OSError) as error:
            raise RouterError(f"{path} cannot be read ({error})", "Restore it") from error
    raise RouterError(
        f"{folder} holds no embedding table (*.{_KEY})", "Name a whole backbone, or leave it out"
    )
