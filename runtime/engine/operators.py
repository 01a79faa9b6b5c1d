"""Find the library of custom operators (`runtime/native`) and check that it loads.

It is C for x86-64 with AVX2, compiled when the package is installed. Without it the backbone runs
on onnxruntime's operators: slower decoding, more memory.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import onnxruntime as ort

DOMAIN = "dlp_edge"
OPERATORS_VARIABLE = "DLP_EDGE_OPERATORS"  # 0 disables them, avx2 limits them to 256-bit vectors


def library_file() -> Path | None:
    """The library's path, if it was built."""
    folder = Path(__file__).parent
    paths = [folder / f"_operators{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def find_operators() -> Path | None:
    """The library's path, if this processor can run it and it is not disabled."""
    return None if os.environ.get(OPERATORS_VARIABLE) == "0" else _loadable_library()


@cache
def _loadable_library() -> Path | None:
    path = library_file()
    if path is not None:
        try:
            ort.SessionOptions().register_custom_ops_library(str(path))
        except Exception:  # onnxruntime's exceptions have no common base class
            return None
    return path
