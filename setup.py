"""What pyproject.toml has no stable words for: our own operators for onnxruntime, in C.

Where they cannot be compiled, everything works without them.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("runtime/native")
setup(
    ext_modules=[
        Extension(
            "dlp_edge.runtime.engine._operators",
            [str(NATIVE / "operators.c")],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            extra_compile_args=["-O3"],
            optional=True,
        )
    ]
)
