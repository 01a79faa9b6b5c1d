"""The part of the build for which pyproject.toml has no stable syntax: the C operator.

Where it cannot be compiled, everything works without it. With DLP_EDGE_STRICT_BUILD=1 (for CI)
compiler warnings are errors, and so is a failed build.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("runtime/native")
STRICT = os.environ.get("DLP_EDGE_STRICT_BUILD") == "1"
setup(
    ext_modules=[
        Extension(
            "dlp_edge.runtime.engine._operators",
            [str(NATIVE / "operators.c")],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            extra_compile_args=["-O3", *(["-Wall", "-Wextra", "-Werror"] if STRICT else [])],
            optional=not STRICT,
        )
    ]
)
