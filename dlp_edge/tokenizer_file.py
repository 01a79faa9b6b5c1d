"""A `tokenizer.json` from a stranger: what it may hold, and a library that may panic over it.

The tokenizers library is Rust; where it did not expect something it panics, which Python sees as
a `PanicException`, no `Exception`. So it is caught by name, here and in every later call.
"""

from __future__ import annotations

from tokenizers import Tokenizer


def load_tokenizer(data: bytes, vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer without its padding and truncation.

    Args:
        vocab_size: ids that there may be; None: any number.

    Raises:
        ValueError: the bytes are no tokenizer, or not a harmless one.
    """
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
