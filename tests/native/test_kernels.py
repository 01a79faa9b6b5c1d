"""The kernels in C: every instruction set against plain C, and which one is chosen."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlp_edge import Runtime
from dlp_edge.runtime.engine.device import Device, choose_device
from dlp_edge.runtime.engine.operators import (
    OPERATORS_VARIABLE,
    PLAIN_OPERATORS,
    library_file,
    operators,
)
from tests.testing.paths import KEPT, ROOT

KERNELS = ("kernels.c", "x86/kernels.c", "arm/kernels.c")
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("tiles") / (
        "tiles.exe" if sys.platform == "win32" else "tiles"
    )
    sources = [
        Path(__file__).with_name("tiles.c"),
        *(ROOT / "runtime/native" / name for name in KERNELS),
    ]
    options = ["-std=gnu11", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([COMPILER, *options, "-o", program, *sources, "-lm"], check=True)
    return program


@pytest.mark.parametrize("first_seed", [0, 10_000, 20_000])
def test_every_set_equals_the_reference_bit_for_bit(tiles: Path, first_seed: int) -> None:
    done = subprocess.run([tiles, str(first_seed), "200"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.split()[1::2], "this processor has none of the instruction sets"
    assert set(done.stdout.split()[1::2]) == {"200"}


@pytest.mark.skipif(library_file() is None, reason="the operator was not built")
def test_the_kernels_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OPERATORS_VARIABLE, raising=False)
    best = operators()
    if best.library is None:
        pytest.skip(best.kernels)
    name, word = best.kernels.split()
    assert word == "kernels"
    monkeypatch.setenv(OPERATORS_VARIABLE, name)
    assert operators() == best


@pytest.mark.parametrize(
    ("asked", "why"), [("0", f"{OPERATORS_VARIABLE}=0"), ("sse9", "this processor lacks")]
)
def test_without_kernels_everybody_is_told(
    asked: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked != "0" and library_file() is None:
        pytest.skip("the operator was not built")
    monkeypatch.setenv(OPERATORS_VARIABLE, asked)
    device = choose_device("cpu", "cpu", 2)
    assert device.operators is None
    assert str(device).startswith(f"cpu (2 threads, {PLAIN_OPERATORS}: 1.4x slower, ")
    assert why in str(device)


def test_a_bundle_without_quantised_matrices_needs_no_kernels() -> None:
    with Runtime(KEPT, threads=1) as runtime:
        assert runtime.device == Device("cpu", 1)
        assert str(runtime.device) == f"cpu (1 threads, {PLAIN_OPERATORS})"
