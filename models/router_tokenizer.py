"""The router's tokenizer: trained on the task texts, or one that exists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from dlp_edge.errors import RouterError
from dlp_edge.models.tasks import Task

PIECES = 30_000  # at most, as ALBERT's
LEAST_COUNT = 5  # a piece is seen as often, or it would be a name to learn by heart
FILE = "tokenizer.json"
_UNKNOWN = "<unk>"


def train_tokenizer(tasks: Sequence[Task]) -> Tokenizer:
    """A lower-case BPE tokenizer of the training texts.

    BPE, where ALBERT has a unigram model: the unigram trainer gives other pieces every time, so
    no seed would give the same router twice.
    """
    tokenizer = Tokenizer(BPE(unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=PIECES,
        min_frequency=LEAST_COUNT,
        special_tokens=[_UNKNOWN],
        show_progress=False,
    )
    texts = [
        text for task in tasks for sample in task.train for text in (sample.prompt, sample.response)
    ]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def open_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer.json, a folder that holds one, or any folder or hub id that transformers reads.

    Raises:
        RouterError: it cannot be read, or its ids have gaps.
    """
    path = Path(source)
    if path.is_dir() and (path / FILE).is_file():
        path = path / FILE
    try:
        tokenizer = (
            Tokenizer.from_file(str(path)) if path.is_file() else _from_transformers(str(source))
        )
    except Exception as error:  # tokenizers raises plain Exception, transformers many kinds
        raise RouterError(
            f"the tokenizer {source} cannot be read ({error})",
            "Name a tokenizer.json, a folder that holds one, or a hub id that can be reached",
        ) from error
    tokenizer.no_truncation()  # windows are cut by their own rule
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size()
    if max(tokenizer.get_vocab().values(), default=-1) != size - 1:
        raise RouterError(
            f"the ids of the tokenizer {source} do not run from 0 to {size - 1}",
            "Use another one, or leave it out to have one trained",
        )
    return tokenizer


def _from_transformers(source: str) -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source).backend_tokenizer
