"""Tasks, each in an environment of its own: `nox -s NAME`, or `nox -l` for the list."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.sessions = ["lint", "types", "test_fast", "docs"]
CONSTRAINTS = ("-c", "constraints.txt")
ROOT = Path(__file__).parent


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and what ruff takes for mistakes."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict."""
    session.install(*CONSTRAINTS, "-e", ".[export,test]")
    session.run(str(ROOT / ".ci" / "types"), external=True, env={"PYTHON": python_of(session)})


@nox.session
def test(session: nox.Session) -> None:
    """All tests; takes pytest's arguments after `--`."""
    session.install(*CONSTRAINTS, "-e", ".[export,test]")
    session.run("pytest", *session.posargs)


@nox.session
def test_fast(session: nox.Session) -> None:
    """The tests that need no torch, where there is none."""
    session.install(*CONSTRAINTS, "-e", ".[cpu,test]")
    session.run("pytest", "-m", "not slow", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site; warnings are errors."""
    session.install(*CONSTRAINTS, ".[docs]")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session
def wheels(session: nox.Session) -> None:
    """The source distribution and a wheel for every platform, compiled by zig, in dist/."""
    session.install(*CONSTRAINTS, "build", "setuptools", "twine", "auditwheel", "ziglang")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--sdist", "--no-isolation")
    session.run("python", str(ROOT / ".ci" / "wheels.py"), "dist")
    session.run("twine", "check", "--strict", *map(str, sorted(Path("dist").iterdir())))
    for wheel in sorted(Path("dist").glob("*-manylinux_*.whl")):
        session.run("auditwheel", "show", str(wheel))


@nox.session
def test_arm64(session: nox.Session) -> None:
    """The operator on ARM64, under qemu (Debian)."""
    session.run(str(ROOT / ".ci" / "arm64"), external=True, env={"PYTHON": python_of(session)})


@nox.session
def test_windows(session: nox.Session) -> None:
    """The operator on Windows, under wine (Debian)."""
    session.install(*CONSTRAINTS, "-e", ".[cpu]")
    session.run(str(ROOT / ".ci" / "windows"), external=True, env={"PYTHON": python_of(session)})


@nox.session
def test_vllm(session: nox.Session) -> None:
    """The front over real vLLM servers on the CPU; takes pytest's arguments after `--`."""
    session.install(*CONSTRAINTS, "-e", ".[export,test]")
    script = str(ROOT / ".ci" / "vllm")
    session.run(script, *session.posargs, external=True, env={"PYTHON": python_of(session)})


@nox.session
def test_ray(session: nox.Session) -> None:
    """The Ray Serve recipe on two nodes of loopback."""
    session.run(str(ROOT / ".ci" / "ray"), external=True, env={"PYTHON": python_of(session)})


@nox.session
def test_gpu_stub(session: nox.Session) -> None:
    """Bundles for CUDA on a stub of CUDA: where nodes lie, what is captured (Linux, gcc)."""
    session.install(*CONSTRAINTS, "-e", ".[export,test]")
    session.run(str(ROOT / ".ci" / "gpu-stub"), external=True, env={"PYTHON": python_of(session)})


@nox.session
def test_webgpu(session: nox.Session) -> None:
    """Bundles on WebGPU, on Mesa's software Vulkan (Debian 12)."""
    session.install(*CONSTRAINTS, "-e", ".[export,test]")
    session.run(str(ROOT / ".ci" / "webgpu"), external=True, env={"PYTHON": python_of(session)})


@nox.session
def sanitize(session: nox.Session) -> None:
    """The operator in C under AddressSanitizer and UBSan (Linux, gcc)."""
    session.install(*CONSTRAINTS, "-e", ".[export,test]")
    session.run(str(ROOT / ".ci" / "sanitize"), external=True, env={"PYTHON": python_of(session)})


def python_of(session: nox.Session) -> str:
    return str(Path(session.bin) / "python")
