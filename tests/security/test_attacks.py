"""Every attack gives its typed error within 5 s and 200 MB, and a good bundle loads afterwards."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dlp_edge import Runtime
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.peft_reader import read_adapter
from dlp_edge.runtime.adapters.edit import _slot_sizes
from dlp_edge.runtime.memory import release_memory
from tests.security.attacks import ADAPTER_ATTACKS, ATTACKS, Attack

pytestmark = pytest.mark.slow

MAX_SECONDS = 5.0
MAX_BYTES = 200 << 20


def cost(call: Callable[[], object], expected: type[Exception]) -> tuple[float, int]:
    """Seconds and bytes above the baseline that a call takes to raise the expected error."""
    process = psutil.Process()
    release_memory()
    baseline = process.memory_info().rss
    peak, done = [baseline], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    begun = time.process_time()  # other work on a busy machine is not the attack's
    try:
        with pytest.raises(expected) as caught:
            call()
    finally:
        seconds = time.process_time() - begun
        done.set()
        thread.join()
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value).strip()
    assert len(str(caught.value)) < 2_000
    return seconds, peak[0] - baseline


@pytest.mark.parametrize(("name", "attack", "expected"), ATTACKS, ids=[a[0] for a in ATTACKS])
def test_bad_bundles(
    bundle_copy: Path, name: str, attack: Attack, expected: type[Exception]
) -> None:
    attack(bundle_copy)
    seconds, memory = cost(lambda: Runtime(bundle_copy), expected)
    assert seconds < MAX_SECONDS
    assert memory < MAX_BYTES


@pytest.mark.parametrize(
    ("name", "attack", "expected"), ADAPTER_ATTACKS, ids=[a[0] for a in ADAPTER_ATTACKS]
)
def test_bad_adapters(
    tiny_bundle: Path,
    tiny_adapters: dict[str, Path],
    tmp_path: Path,
    name: str,
    attack: Attack,
    expected: type[Exception],
) -> None:
    sizes = _slot_sizes(open_bundle(tiny_bundle).manifest)
    folder = Path(shutil.copytree(tiny_adapters["sums"], tmp_path / "adapter"))
    assert read_adapter("good", folder, sizes, slots_only=True).pairs
    attack(folder)
    seconds, memory = cost(lambda: read_adapter("bad", folder, sizes, slots_only=True), expected)
    assert seconds < MAX_SECONDS
    assert memory < MAX_BYTES


def test_a_good_bundle_loads_after_all_of_them(bundle_copy: Path) -> None:
    with Runtime(bundle_copy) as runtime:
        assert runtime.generate("Hello", max_new_tokens=2).usage.completion_tokens == 2
