"""Our own operator for onnxruntime, where it could be built: the library, and whether it runs.

It is C (`runtime/native`), compiled when the package is installed, for x86-64 with AVX2. Without it
everything works on onnxruntime's operators; a token takes longer, and a backbone more memory.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import onnxruntime as ort

DOMAIN = "dlp_edge"
OPERATORS_VARIABLE = "DLP_EDGE_OPERATORS"  # 0 leaves them out, avx2 keeps to vectors of 256 bits


def library_file() -> Path | None:
    """The library, if it was built."""
    folder = Path(__file__).parent
    paths = [folder / f"_operators{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def find_operators() -> Path | None:
    """The library, if this processor can run it, and it is not switched off."""
    return None if os.environ.get(OPERATORS_VARIABLE) == "0" else _usable()


@cache
def _usable() -> Path | None:
    path = library_file()
    if path is not None:
        try:
            ort.SessionOptions().register_custom_ops_library(str(path))
        except Exception:  # onnxruntime's exceptions share no base class of their own
            return None
    return path
