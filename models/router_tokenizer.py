"""The router's tokenizer: trained on the task texts, or one that exists, ALBERT's above all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer

from dlp_edge.errors import RouterError
from dlp_edge.models.tasks import Task

PIECES = 16_000  # at most; more of them are learned by heart rather than understood
LEAST_COUNT = 5  # a piece is seen as often, or it would be a name to learn by heart
FILE = "tokenizer.json"
SENTENCEPIECE = "spiece.model"
_UNKNOWN = "<unk>"


def train_tokenizer(tasks: Sequence[Task], words: Sequence[str] = ()) -> Tokenizer:
    """A BPE tokenizer of the training texts, which tells capitals from small letters.

    BPE, where ALBERT has a unigram model: the unigram trainer gives other pieces every time, so
    no seed would give the same router twice.

    Args:
        words: become pieces, too, as far as there is room.
    """
    tokenizer = Tokenizer(BPE(unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
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
    texts += [" ".join(words)] * LEAST_COUNT
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def open_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer.json, ALBERT's spiece.model, a folder that holds one of the two, or any folder
    or hub id that transformers reads.

    Raises:
        RouterError: it cannot be read, or its ids have gaps.
    """
    path = Path(source)
    for name in (FILE, SENTENCEPIECE):
        if path.is_dir() and (path / name).is_file():
            path = path / name
    try:
        if path.is_file():
            tokenizer = (
                from_sentencepiece(path)
                if path.suffix == ".model"
                else Tokenizer.from_file(str(path))
            )
        else:
            tokenizer = _from_transformers(str(source))
    except Exception as error:  # tokenizers raises plain Exception, transformers many kinds
        raise RouterError(
            f"the tokenizer {source} cannot be read ({str(error).splitlines()[0]})",
            "Name a tokenizer.json, a spiece.model, a folder that holds one, a hub id that can be "
            "reached, or `train`",
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


def from_sentencepiece(path: Path) -> Tokenizer:
    """ALBERT's tokenizer from its spiece.model (a SentencePiece unigram model): the same pieces
    and scores, behind ALBERT's own normalisation (lower case, no accents)."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(path))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=model.unk_id(), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.NFKC(),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def _from_transformers(source: str) -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source).backend_tokenizer
