"""Find the library of custom operators (`runtime/native`), check that it loads, name its kernels.

It is C, compiled when a wheel is built or the package is installed from source. Without it the
backbone runs on onnxruntime's operators: slower decoding, more memory.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnxruntime as ort

from dlp_edge.bundle.manifest import BackboneEntry
from dlp_edge.runtime.engine.ort_errors import first_line

DOMAIN = "dlp_edge"
# 0 disables them; the name of an instruction set, such as avx2, chooses its kernels.
OPERATORS_VARIABLE = "DLP_EDGE_OPERATORS"
PLAIN_OPERATORS = "plain onnxruntime operators"


@dataclass(frozen=True)
class Operators:
    """The custom operators of this process.

    Attributes:
        library: their library, if it can be used.
        kernels: what multiplies quantised matrices, for people: the instruction set, or
            onnxruntime's operators and why.
    """

    library: Path | None
    kernels: str


def library_file() -> Path | None:
    """The library's path, if it was built."""
    path = Path(__file__).with_name("_operators.dll" if os.name == "nt" else "_operators.so")
    return path if path.is_file() else None


def find_operators() -> Path | None:
    """The library's path, if this processor can run it and it is not disabled."""
    return operators().library


def operators() -> Operators:
    """The custom operators, as the environment asks for them now."""
    return _load(os.environ.get(OPERATORS_VARIABLE, "best"))


def kernels_of(entry: BackboneEntry) -> str:
    """What multiplies a CPU backbone's matrices here, for people."""
    return operators().kernels if is_quantised(entry) else PLAIN_OPERATORS


def is_quantised(entry: BackboneEntry) -> bool:
    """Whether a backbone has matrices for the operators. Bundles for CUDA are fp16 and have other
    nodes."""
    return entry.quantisation in ("int4", "int8") and entry.dtype == "float32"


@cache
def _load(asked: str) -> Operators:
    if asked == "0":
        return _without(f"{OPERATORS_VARIABLE}=0")
    path = library_file()
    if path is None:
        return _without("dlp-edge was installed without its operator in C")
    try:
        ort.SessionOptions().register_custom_ops_library(str(path))
        chosen = ctypes.CDLL(str(path)).ChosenKernels
    except Exception as error:  # onnxruntime's exceptions have no common base class
        return _without(first_line(error))
    chosen.restype = ctypes.c_char_p
    return Operators(path, f"{chosen().decode()} kernels")


def _without(why: str) -> Operators:
    return Operators(None, f"{PLAIN_OPERATORS}: 1.4x slower, {why}")
