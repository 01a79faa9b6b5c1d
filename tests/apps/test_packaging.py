"""What is shipped: the source distribution, the wheel, and programs frozen with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dlp_edge.runtime.engine.operators import library_file
from tests.testing.paths import ROOT

pytestmark = pytest.mark.slow

LIBRARY = library_file()  # where this can be built, the wheel has it

# What lies in a checkout without being part of it.
LEFTOVERS = (".*", "__pycache__", "build", "dist", "*.egg-info", "*.so", "*.dll")
# Folder of the checkout -> package.
PACKAGES = {
    "dlp_edge": "dlp_edge",
    "export": "dlp_edge/export",
    "models": "dlp_edge/models",
    "runtime": "dlp_edge/runtime",
}
SCRIPT = """
import sys
from pathlib import Path
from dlp_edge import Runtime

with Runtime(Path(__file__).with_name("bundle"), threads=1) as runtime:
    reply = runtime.generate("Select the city of row 12", max_new_tokens=40)
    print(ascii(reply.text), reply.sentences[0].fusion, runtime.route("Write an email").selected)
print(sorted(name for name in ("torch", "transformers", "peft", "onnx") if name in sys.modules))
"""


def run(folder: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that must succeed, in a folder, since the checkout would be imported from."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy: building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout") / "dlp-edge"
    return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFTOVERS)))


@pytest.fixture(scope="module")
def contents(checkout: Path) -> set[str]:
    return files_below(checkout)


@pytest.fixture(scope="module")
def dist(contents: set[str], checkout: Path) -> Path:
    """The source distribution, and the wheel built from it; without the network."""
    build = [sys.executable, "-m", "build", "--no-isolation"]
    done = run(checkout, *build, PYTHONDONTWRITEBYTECODE="")  # if set, setuptools warns of it
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    return checkout / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, to be put on PYTHONPATH: before the checkout, if that
    is installed."""
    folder = tmp_path_factory.mktemp("installed")
    [wheel] = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(folder, *pip, "--target", folder, wheel)
    return folder


@pytest.fixture
def script(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A program with the bundle beside it."""
    path = tmp_path / "ask.py"
    path.write_text(SCRIPT)
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return path


def test_the_wheel_holds_the_packages_and_nothing_else(dist: Path, contents: set[str]) -> None:
    [path] = dist.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        [entry_points] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
        assert "dlp_edge.freezing:hook_dirs" in wheel.read(entry_points).decode()
    expected = {
        package + file.removeprefix(folder)
        for folder, package in PACKAGES.items()
        for file in contents
        if file.startswith(f"{folder}/") and not file.startswith("runtime/native/")
    }
    built = {name for name in found if "/_operators." in name}
    assert found - built == expected
    assert len(built) == (LIBRARY is not None)
    for needed in (
        "dlp_edge/py.typed",
        "dlp_edge/demo/router/router.safetensors",
        "dlp_edge/export/heldout.txt",
        "dlp_edge/freezing/hook-dlp_edge.py",
    ):
        assert needed in found


def build_wheel(checkout: Path, tmp_path: Path, **environment: str) -> tuple[str, list[Path]]:
    """Builds from a copy, since a build leaves files behind; what it printed, and the wheels."""
    copy = shutil.copytree(checkout, tmp_path / "copy", ignore=shutil.ignore_patterns(*LEFTOVERS))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    done = subprocess.run(
        [*command, copy], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.stdout + done.stderr, list(tmp_path.glob("*.whl"))


def test_without_a_compiler_the_install_says_so(checkout: Path, tmp_path: Path) -> None:
    printed, [wheel] = build_wheel(checkout, tmp_path, CC="no-such-compiler")
    assert printed.count("installed WITHOUT its operator in C") == 1
    assert "no-such-compiler does not start" in printed
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "/_operators." in name]


def test_a_release_without_the_operator_fails(checkout: Path, tmp_path: Path) -> None:
    strict = {"CC": "no-such-compiler", "DLP_EDGE_STRICT_BUILD": "1"}
    assert build_wheel(checkout, tmp_path, **strict)[1] == []


@pytest.mark.skipif(LIBRARY is None, reason="no compiler for the operator")
def test_a_wheel_serves_every_python_of_its_platform(checkout: Path, tmp_path: Path) -> None:
    for platform in ("any", "plan9_x86_64"):
        folder = tmp_path / platform
        folder.mkdir()
        _, [wheel] = build_wheel(checkout, folder, DLP_EDGE_PLATFORM=platform)
        assert wheel.name.endswith(f"-py3-none-{platform}.whl")
        with zipfile.ZipFile(wheel) as archive:
            built = [name for name in archive.namelist() if "/_operators." in name]
        assert len(built) == (platform != "any")


def test_the_source_distribution_holds_the_checkout(dist: Path, contents: set[str]) -> None:
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    made = {name for name in names if name.split("/")[0].endswith(".egg-info")}
    assert names - made - {"PKG-INFO", "setup.cfg"} == contents


def test_the_installed_wheel_answers(installed: Path, script: Path) -> None:
    where = "import dlp_edge; print(dlp_edge.__file__)"
    python = {"PYTHONPATH": str(installed)}
    found = run(installed, sys.executable, "-c", where, **python).stdout
    assert found.startswith(str(installed))
    assert run(installed, sys.executable, script, **python).stdout.endswith("[]\n")


def test_freezing_an_editable_install_is_refused() -> None:
    """It would freeze, and fail at its first import."""
    hook = ROOT / "dlp_edge" / "freezing" / "hook-dlp_edge.py"
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(hook)!r})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install ." in done.stderr


def test_a_frozen_program_answers_elsewhere(installed: Path, script: Path, tmp_path: Path) -> None:
    """One folder by PyInstaller, moved, in an environment that knows nothing of Python."""
    python = {"PYTHONPATH": str(installed)}
    expected = run(installed, sys.executable, script, **python).stdout
    data = f"{script.with_name('bundle')}{os.pathsep}bundle"
    places = ("--distpath", tmp_path / "dist", "--workpath", tmp_path / "work")
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--add-data", data, *places]
    run(
        tmp_path,
        *command,
        "--specpath",
        tmp_path,
        script,
        **python,
        PYINSTALLER_CONFIG_DIR=str(tmp_path),
    )
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "dist" / "ask").rename(elsewhere)
    for path in (script, script.with_name("bundle"), tmp_path / "work"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    program = "ask.exe" if os.name == "nt" else "ask"
    keep = {name: os.environ[name] for name in ("SYSTEMROOT", "TEMP") if name in os.environ}
    done = subprocess.run(
        [elsewhere / program], cwd=elsewhere, env=keep, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == expected, done.stderr
    built = list(elsewhere.rglob("dlp_edge/runtime/engine/_operators.*"))
    assert len(built) == (LIBRARY is not None)
    size = sum(path.stat().st_size for path in elsewhere.rglob("*") if not path.is_symlink())
    assert size < 250 << 20  # 134 MB; with torch, which the hook keeps out, 1.5 GB


@pytest.mark.skipif(sys.platform != "linux", reason="scripts for Linux")
@pytest.mark.parametrize("script", ["arm64", "windows"])
def test_a_platform_that_cannot_be_tested_here_is_no_silent_pass(
    script: str, tmp_path: Path
) -> None:
    """Not on a Mac, and not without a package manager."""
    for tool in ("bash", "dirname", "realpath", "python3", "ls"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    reasons = []
    for system in ("Darwin arm64", "Linux x86_64"):
        (tmp_path / "uname").write_text(f"#!/bin/sh\necho {system}\n", encoding="ascii")
        (tmp_path / "uname").chmod(0o755)
        if system.startswith("Linux") and Path("/usr/lib/wine/wine64").exists():
            continue  # found without a search
        command = [str(ROOT / ".ci" / script), str(tmp_path / "environment")]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", env={"PATH": str(tmp_path)}
        )
        assert done.returncode == 77
        reasons.append(done.stderr)
    assert reasons[0] == "skipped: needs Linux on x86-64, this is Darwin arm64\n"
    assert all("apt-get" in reason for reason in reasons[1:])
    assert not (tmp_path / "environment").exists()
