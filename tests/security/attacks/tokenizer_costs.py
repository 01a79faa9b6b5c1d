"""Tokenizers that would cost without bound together, or on the text of a long context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.security.attacks.costs import added, normalizer, replacement
from tests.security.attacks.forge import Attack, edited, replaced
from tests.security.attacks.texts import Document, on_json

_SLOW = r"a{1,16}a{1,16}a{1,7}\x02"  # 1,792 ways to fail at every place
_PIECE = {"Sequence": {"id": "A", "type_id": 0}}


def _repeated(times: int) -> Callable[[Document], object]:
    """A post-processor that repeats the text."""
    pair = [_PIECE, {"Sequence": {"id": "B", "type_id": 0}}]
    post = {
        "type": "TemplateProcessing", "single": [_PIECE] * times, "pair": pair,
        "special_tokens": {},
    }  # fmt: skip
    return lambda d: d.update(post_processor=post)


def _splits(pattern: str, times: int, behavior: str = "Isolated") -> Callable[[Document], object]:
    split = {
        "type": "Split", "behavior": behavior, "invert": False, "pattern": {"Regex": pattern}
    }  # fmt: skip
    steps = {"type": "Sequence", "pretokenizers": [split] * times}
    return lambda d: d.update(pre_tokenizer=steps)


def _part(name: str, **state: object) -> Callable[[Document], object]:
    return lambda d: d.update({name: state})


def _special_tokens(document: Document) -> None:
    """200 special tokens that begin alike, as long as tokens may be, and one that does not."""
    contents = ["b\x02", *("a" * (1_600 + number) + "\x02" for number in range(200))]
    vocab = document["model"]["vocab"]
    kept = {token: id_ for token, id_ in vocab.items() if id_ >= len(contents)}
    vocab.clear()
    vocab.update(kept)
    for number, content in enumerate(contents):
        vocab[content] = number
        added(id=number, content=content, special=True)(document)
    document["model"]["merges"] = []


_TOKENIZERS: dict[str, Callable[[Document], object]] = {
    "a text repeated": _repeated(60),
    "a text left out": _repeated(0),
    "slow patterns together": _splits(_SLOW, 60),
    "a slow pattern": _splits(_SLOW, 1),
    "splits of everything": _splits(".", 40, "Contiguous"),
    "replacements back and forth": normalizer(*[replacement("a", "b"), replacement("b", "a")] * 30),
    "special tokens that begin alike": _special_tokens,
    "pieces of no length": _part("pre_tokenizer", type="FixedLength", length=0),
    "pieces of a character": _part("pre_tokenizer", type="FixedLength", length=1),
    "a space of a letter": _part(
        "pre_tokenizer", type="Metaspace", replacement="a", prepend_scheme="always", split=True
    ),
    "strips without end": _part(
        "decoder", type="Strip", content="a", start=1 << 62, stop=1 << 62
    ),
    "padding of a terabyte": _part(
        "padding", strategy={"Fixed": 1 << 40}, direction="Right", pad_to_multiple_of=None,
        pad_id=0, pad_type_id=0, pad_token="x",
    ),
    "chance": lambda d: d["model"].update(dropout=0.5),
    "no words": lambda d: d.update(pre_tokenizer=None),
    "an added token that strips right": added(rstrip=True),
}  # fmt: skip


def _in_a_long_context(attack: Attack) -> Attack:
    """The context is what a bundle says that it is: then a long text is encoded."""

    def both(folder: Path) -> None:
        edited(lambda m: m["backbone"].update(context_length=65_536))(folder)
        attack(folder)

    return both


ATTACKS: dict[str, Attack] = {
    f"{what}: {name}": _in_a_long_context(replaced(file, on_json(change)))
    for what, file in (
        ("tokenizer", "tokenizer.json"),
        ("router tokenizer", "router_tokenizer.json"),
    )
    for name, change in _TOKENIZERS.items()
}
