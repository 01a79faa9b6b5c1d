"""Silences libraries that print and log to the user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Discard what the block prints and logs: the model builder prints a line per node, and
    transformers draws its own progress bars. Errors still propagate."""
    discarded = io.StringIO()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
            yield
    finally:
        logging.disable(level)
