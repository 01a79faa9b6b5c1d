"""The wheels of a release, from one machine: `python .ci/wheels.py DIST` (or `nox -s wheels`).

Unpacks the source distribution in DIST for each platform, compiles the operator with zig's C
compiler, and lets pip choose among the wheels as it would on that platform. Any failed step is an
error: no release lacks an operator by accident. Needs build, setuptools and ziglang.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# The wheel's platform -> zig's target. manylinux_2_17 is CentOS 7's C library.
TARGETS = {
    "manylinux_2_17_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux_2_17_aarch64": "aarch64-linux-gnu.2.17",
    "win_amd64": "x86_64-windows-gnu",
    "win_arm64": "aarch64-windows-gnu",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
    "any": "",
}
# Platforms without an operator of their own (no onnxruntime is published for Intel Macs).
PURE = ("musllinux_1_2_x86_64", "macosx_11_0_x86_64")
CFLAGS = "-g0 -s -fno-sanitize=undefined"  # zig turns the sanitizer on by default


def main() -> None:
    dist = Path(sys.argv[1]).resolve()
    [source] = dist.glob("*.tar.gz")
    for platform, target in TARGETS.items():
        build(source, dist, platform, target)
    for wheel in sorted(dist.glob("*.whl")):
        check_contents(wheel)
    for platform in (*TARGETS, *PURE):
        if platform != "any":
            check_choice(dist, platform, "any" if platform in PURE else platform)


def build(source: Path, dist: Path, platform: str, target: str) -> None:
    compiler = shlex.join([sys.executable, "-m", "ziglang", "cc", "-target", target])
    environment = {"CC": compiler, "CFLAGS": CFLAGS, "DLP_EDGE_PLATFORM": platform}
    if "macos" in target:
        environment["CFLAGS"] += " -Wl,-install_name,@rpath/_operators.so"
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        [tree] = Path(folder).iterdir()
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", dist, tree]
        strict = {"DLP_EDGE_STRICT_BUILD": "1"}
        subprocess.run(command, check=True, env={**os.environ, **environment, **strict})


def check_contents(wheel: Path) -> None:
    platform = wheel.stem.split("-")[-1]
    with zipfile.ZipFile(wheel) as archive:
        found = [Path(name).name for name in archive.namelist() if "/_operators." in name]
    library = "_operators.dll" if platform.startswith("win") else "_operators.so"
    if found != ([] if platform == "any" else [library]):
        raise SystemExit(f"{wheel.name} holds {found}")


def check_choice(dist: Path, platform: str, expected: str) -> None:
    """pip on `platform` must install the wheel for `expected`."""
    with tempfile.TemporaryDirectory() as folder:
        places = ["--no-index", "--find-links", dist, "--target", folder]
        only = ["--only-binary=:all:", "--platform", platform, "--no-deps", "--quiet"]
        command = [sys.executable, "-m", "pip", "install", *places, *only, "dlp-edge"]
        subprocess.run(command, check=True)
        [tags] = Path(folder).glob("*.dist-info/WHEEL")
        if f"Tag: py3-none-{expected}\n" not in tags.read_text(encoding="utf-8"):
            raise SystemExit(f"pip does not choose the wheel for {expected} on {platform}")
    print(f"pip on {platform} installs the wheel for {expected}")


main()
