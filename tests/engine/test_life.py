"""Loading, closing, and what a Runtime takes and gives back."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import BundleError, Runtime, UsageError
from dlp_edge.runtime.loaded_bundle import LoadedBundle


def test_progress_never_goes_back_and_names_its_stages(tiny_bundle: Path) -> None:
    told: list[tuple[str, float]] = []
    with Runtime(tiny_bundle, on_progress=lambda stage, part: told.append((stage, part))):
        pass
    fractions = [part for _, part in told]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    stages = list(dict.fromkeys(stage for stage, _ in told))
    assert stages == ["manifest", "tokenizer", "router", "checksums", "backbone", "ready"]


def test_loading_can_be_aborted_at_every_stage(tiny_bundle: Path) -> None:
    class EnoughError(Exception):
        pass

    told: list[str] = []
    with Runtime(tiny_bundle, on_progress=lambda stage, _: told.append(stage)):
        pass
    for at in range(len(told)):
        count = iter(range(len(told)))

        def abort(stage: str, part: float, at: int = at, count: object = count) -> None:
            if next(count) == at:  # type: ignore[call-overload]
                raise EnoughError

        with pytest.raises(EnoughError):
            Runtime(tiny_bundle, on_progress=abort)
    with Runtime(tiny_bundle) as runtime:
        assert runtime.generate("Hello", adapters={}, max_new_tokens=3).text


def test_an_estimate_before_loading(tiny_bundle: Path, tmp_path: Path) -> None:
    estimate = Runtime.estimate(tiny_bundle, max_context=256)
    with Runtime(tiny_bundle, max_context=256) as runtime:
        assert estimate.cache == runtime._open().engine.decoder.cache_bytes
    sizes = {path.name: path.stat().st_size for path in tiny_bundle.iterdir()}
    assert estimate.weights >= sizes["backbone.onnx.data"]
    assert estimate.adapters == sizes["adapters.safetensors"]
    assert estimate.total > estimate.weights
    assert estimate.fits
    assert Runtime.estimate(tiny_bundle, 10**9).cache == Runtime.estimate(tiny_bundle, 512).cache
    with pytest.raises(BundleError):
        Runtime.estimate(tmp_path)
    with pytest.raises(UsageError):
        Runtime.estimate(tiny_bundle, 0)


def test_an_estimate_of_a_changed_bundle(bundle_copy: Path) -> None:
    before = Runtime.estimate(bundle_copy)
    with Runtime(bundle_copy) as runtime:
        runtime.remove_adapter("sql")
    assert 0 < Runtime.estimate(bundle_copy).adapters < before.adapters


LOADS = """
import gc, sys
import psutil
from dlp_edge import Runtime
process = psutil.Process()
def load(fail):
    try:
        with Runtime(sys.argv[1], on_progress=stop if fail else None) as runtime:
            runtime.generate("Hello", adapters="sums", max_new_tokens=5)
            runtime.session().send("Hello", adapters={}, max_new_tokens=5)
            if fail is None:
                raise KeyError
    except KeyError:
        pass
def stop(stage, part):
    if part == 1.0:
        raise KeyError
for i in range(60):
    load((False, True, None)[i % 3])
    gc.collect()
    if i in (9, 59):
        print(process.memory_info().rss)
"""


@pytest.mark.slow
def test_loading_again_fifty_times_does_not_grow(tiny_bundle: Path) -> None:
    """Closed as usual, failed while loading, and left through an exception, in turn."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tiny_bundle)], capture_output=True, text=True, check=True
    )
    early, late = (int(line) for line in done.stdout.split())
    assert late - early < 10_000_000


def test_a_closed_runtime_holds_nothing(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle)
    stream = runtime.stream("Hello", adapters={}, max_new_tokens=50)
    next(stream)
    backbone = runtime._open().backbone
    runtime.close()
    gc.collect()
    held = [
        referrer
        for referrer in gc.get_referrers(backbone)
        if type(referrer).__module__.startswith("dlp_edge")
    ]
    assert held == []
    assert stream.ended
    runtime.close()  # twice is fine


def test_a_stream_iterated_in_place_is_closed_with_the_runtime(tiny_bundle: Path) -> None:
    """`for chunk in rt.stream(...)`: nothing but the loop refers to the stream."""
    runtime = Runtime(tiny_bundle)
    started, texts = threading.Event(), []

    def talk() -> None:
        for chunk in runtime.stream("x" * 50, adapters={}, temperature=2.0, max_new_tokens=400):
            texts.append(chunk.text)
            started.set()
            time.sleep(0.01)

    thread = threading.Thread(target=talk)
    thread.start()
    assert started.wait(10)
    known = len(runtime._streams._streams)
    runtime.close()
    thread.join(10)
    assert known == 1
    assert not thread.is_alive()


def test_a_request_prepared_before_closing_is_not_answered(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(tiny_bundle)
    prepare = LoadedBundle.prepare

    def slow(*args: Any) -> Any:
        answer = prepare(*args)
        runtime.close()
        return answer

    monkeypatch.setattr(LoadedBundle, "prepare", slow)
    with pytest.raises(UsageError, match="closed"):
        runtime.generate("Hello", adapters={})


def test_closing_while_another_thread_prefills_is_quick(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle)
    errors: list[BaseException] = []

    def talk() -> None:
        try:
            while True:
                runtime.generate("x" * 400, adapters={}, max_new_tokens=2)
        except UsageError as error:  # closed
            errors.append(error)

    thread = threading.Thread(target=talk)
    thread.start()
    time.sleep(0.3)
    runtime.close()
    thread.join(10)
    assert not thread.is_alive()
    assert "closed" in str(errors[0])
