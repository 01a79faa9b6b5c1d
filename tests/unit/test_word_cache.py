"""Word by word tokenizing gives what the tokenizer gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from dlp_edge.runtime.routing.word_cache import CachingEncoder

TEXTS = ["Name all 12 books, please.", "It's over; isn't it?", "a b c d e f g"]


def by_words() -> Tokenizer:
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    )
    return tokenizer


def with_spaces() -> Tokenizer:
    """One whose words begin with their space, as GPT-2's."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


WORDWISE, SPACED = by_words(), with_spaces()
ENCODERS = {
    "by words": (WORDWISE, CachingEncoder(WORDWISE)),
    "spaced": (SPACED, CachingEncoder(SPACED)),
}


@pytest.mark.parametrize("kind", ENCODERS)
@given(text=st.text(alphabet=st.sampled_from("abiest12 \n\t.,'?éß"), max_size=40))
def test_gives_the_tokenizers_ids(kind: str, text: str) -> None:
    tokenizer, encoder = ENCODERS[kind]
    plain = " ".join(text.split()) if tokenizer is WORDWISE else text
    expected = tokenizer.encode(plain, add_special_tokens=False).ids
    assert encoder.encode(text) == expected
    assert encoder.encode(text) == expected  # and from memory


def test_finds_out_which_tokenizers_work_by_words(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    separately, whole = CachingEncoder._encode_separately, CachingEncoder._encode_whole
    monkeypatch.setattr(
        CachingEncoder,
        "_encode_separately",
        lambda self, new: asked.append(new) or separately(self, new),
    )
    monkeypatch.setattr(
        CachingEncoder, "_encode_whole", lambda self, text: asked.append(text) or whole(self, text)
    )
    text = "Name  all books, Name"
    for tokenizer, expected in ((WORDWISE, [["Name", "all", "books,"]]), (SPACED, [text, text])):
        encoder = CachingEncoder(tokenizer)
        asked.clear()
        encoder.encode(text)
        encoder.encode(text)
        assert asked == expected


def test_forgets_words_beyond_its_limit() -> None:
    encoder = CachingEncoder(WORDWISE, capacity=120)
    for number in range(200):
        text = f"word{number} and {number}"
        assert encoder.encode(text) == WORDWISE.encode(text, add_special_tokens=False).ids
        assert sum(map(len, encoder._cache)) <= 120
    long = " ".join(f"x{number}" for number in range(100))
    assert encoder.encode(long) == WORDWISE.encode(long, add_special_tokens=False).ids
