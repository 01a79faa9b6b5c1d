"""What pyproject.toml has no syntax for in the build: the operator in C, and the wheel's tag.

The operator is a shared library, not a Python module: a wheel serves every Python of its platform.
Where it cannot be compiled, dlp-edge is installed without it and says so. Environment variables:

- CC: the compiler (default: cc, gcc or clang); CFLAGS: further options.
- DLP_EDGE_STRICT_BUILD=1: warnings of the compiler and a failed build are errors.
- DLP_EDGE_PLATFORM: the wheel's platform, if CC compiles for another; "any" compiles nothing.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("runtime/native")
STRICT = os.environ.get("DLP_EDGE_STRICT_BUILD") == "1"
PLATFORM = os.environ.get("DLP_EDGE_PLATFORM", "")
WINDOWS = PLATFORM.startswith("win") if PLATFORM else os.name == "nt"
# Without contraction of a * b + c, every compiler's results are the same bit for bit.
OPTIONS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-shared"]
NOTICE = """\
**********************************************************************************************
dlp-edge is installed WITHOUT its operator in C, on plain onnxruntime operators:
1.4x slower decoding, 1.5x the memory. {why}
Remedy: install a wheel for this platform; or install gcc or clang, then
        pip install --force-reinstall --no-deps --no-cache-dir dlp-edge
**********************************************************************************************
"""


class BuildOperator(build_ext):
    """Compiles the operator with one command, without Python's headers."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (".dll" if WINDOWS else ".so")

    def build_extension(self, ext: Extension) -> None:
        try:
            # Some linkers write more files beside the library: only the library goes on.
            library = Path(self.build_temp, "operator", Path(self.get_ext_filename(ext.name)).name)
            library.parent.mkdir(parents=True, exist_ok=True)
            compile_operator(ext.sources, library)
        except CompileError as error:
            if not STRICT:
                tell(NOTICE.format(why=error))
            raise
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", PLATFORM or super().get_tag()[2]


def compile_operator(sources: list[str], library: Path) -> None:
    compiler = shlex.split(os.environ.get("CC", "")) or [find_compiler()]
    options = [*OPTIONS, *([] if WINDOWS else ["-fPIC"])]
    options += ["-Wall", "-Wextra", "-Werror"] if STRICT else []
    options += shlex.split(os.environ.get("CFLAGS", ""))
    command = [*compiler, *options, "-o", str(library), *sources]
    print(shlex.join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except OSError as error:
        raise CompileError(f"{compiler[0]} does not start ({error}).") from error
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{compiler[0]} failed with exit code {error.returncode}.") from error


def find_compiler() -> str:
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        raise CompileError("No C compiler (gcc or clang) was found.")
    return found


def tell(message: str) -> None:
    """To stderr, and to the terminal if there is one: pip hides what a build prints."""
    print(message, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            name = "CONOUT$" if os.name == "nt" else "/dev/tty"
            with open(name, "w", encoding="utf-8") as terminal:  # noqa: PTH123
                terminal.write(f"\n{message}")
        except OSError:
            pass  # there is no terminal


operator = Extension(
    "dlp_edge.runtime.engine._operators",
    [str(path) for path in sorted(NATIVE.rglob("*.c"))],
    depends=[str(path) for path in sorted(NATIVE.rglob("*.h"))],
    optional=not STRICT,
)
setup(
    ext_modules=[] if PLATFORM == "any" else [operator],
    cmdclass={"build_ext": BuildOperator, "bdist_wheel": PlatformWheel},
)
