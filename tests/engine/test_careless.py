"""What a careless process does: ends without `close`, drops a Runtime, changes its folder."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from dlp_edge import BundleError, BusyError, Runtime
from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.edition import read_current
from dlp_edge.bundle.files import TOKENIZER
from dlp_edge.native_calls import NativeCalls
from dlp_edge.runtime.adapters.edit import add_skill, remove_skill
from dlp_edge.runtime.routing.policy import load_router

LONG = "dict(adapters={}, temperature=1.0, max_new_tokens=400, repetition_stop=False)"
WAYS = {
    "stream": f"[None for chunk in rt.stream('x' * 50, **{LONG})]",
    "generate": f"rt.generate('x' * 400, **{LONG})",
    "batch": f"rt.generate_batch(['x' * 50] * 3, **{LONG})",
    "session": f"rt.session().send('x' * 50, **{LONG})",
    "route": "rt.route('How many apples? ' * 200)",
    "count": "rt.count_tokens('How many apples? ' * 20000)",
    "load": "Runtime(sys.argv[1])",
}
ENDS = """
import sys, threading, time
from dlp_edge import Runtime
rt = Runtime(sys.argv[1], threads=1)
begun = threading.Event()
def work():
    while True:
        begun.set()
        {way}
for _ in range({threads}):
    threading.Thread(target=work, daemon=True).start()
begun.wait()
time.sleep(0.15)
print("ready", flush=True)
{last}
"""


def run_to_its_end(bundle: Path, way: str, last: str = "", threads: int = 2) -> tuple[int, str]:
    """Exit code and standard error of a process whose threads work until it ends."""
    code = ENDS.format(way=WAYS[way], last=last, threads=threads)
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_process_may_end_while_daemon_threads_work(tiny_bundle: Path, way: str) -> None:
    assert run_to_its_end(tiny_bundle, way) == (0, "")


def test_an_exit_code_is_kept(tiny_bundle: Path) -> None:
    assert run_to_its_end(tiny_bundle, "stream", "sys.exit(7)") == (7, "")


def test_an_exit_handler_may_close(tiny_bundle: Path) -> None:
    """Handlers that are registered before dlp_edge is imported run after its own."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: (print(rt.count_tokens('Hi')), rt.close()))\n"
        "from dlp_edge import Runtime\n"
        "rt = Runtime(sys.argv[1], threads=1)\n"
        "next(rt.stream('Hello', adapters={}, max_new_tokens=50))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "2\n")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT for one process")
@pytest.mark.parametrize("own", [True, False], ids=["main thread", "daemon thread"])
def test_ctrl_c_ends_a_process(tiny_bundle: Path, own: bool) -> None:
    last = "work()" if own else "time.sleep(60)"
    code = ENDS.format(way=WAYS["stream"], last=last, threads=1)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_the_end_waits_for_calls_and_lets_no_thread_in() -> None:
    calls, inside, leave = NativeCalls(), threading.Event(), threading.Event()
    outcomes: list[str] = []

    class Request:
        def set(self) -> None:
            leave.set()

    request = Request()
    calls.cancel_at_exit(request)

    def work() -> None:
        with calls:
            inside.set()
            assert leave.wait(10)
        outcomes.append("left")
        try:
            with calls:
                outcomes.append("entered again")
        except SystemExit:  # ends a thread in silence
            outcomes.append("ended")

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    assert calls.end(10)
    thread.join(10)
    assert outcomes == ["left", "ended"]
    with calls:  # the main thread may
        assert not calls.end(0.01)


DROPS = """
import json, sys, psutil
from dlp_edge import Runtime
def rss():
    return psutil.Process().memory_info().rss
def load():
    runtime = Runtime(sys.argv[1], threads=1, max_context=512)
    runtime.generate("Hello", max_new_tokens=5)
    return runtime
load()
found = []
for _ in range(8):
    rt = load()
    found.append(rss())
del rt
for chunk in load().stream("Hello", adapters={}, max_new_tokens=5):
    pass
chat = load().session()
text = chat.send("Hello", adapters={}, max_new_tokens=5).text
print(json.dumps(found))
"""


def test_a_runtime_that_is_bound_anew_returns_its_memory(tiny_bundle: Path) -> None:
    """What a stream or a session still uses stays."""
    done = subprocess.run(
        [sys.executable, "-c", DROPS, str(tiny_bundle)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert max(found[2:]) - found[1] < 3_000_000


def test_a_dropped_runtime_holds_nothing(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle)
    backbone = weakref.ref(runtime._open().backbone)
    chat = runtime.session()
    del runtime
    assert chat.send("Hello", adapters={}, max_new_tokens=3).text
    assert backbone() is not None
    del chat
    assert backbone() is None


def test_a_relative_path_outlives_a_chdir(
    bundle_copy: Path, parrot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle_copy.parent)
    with Runtime(bundle_copy.name) as runtime:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        runtime.add_adapter("parrot", parrot)
        runtime.remove_adapter("sql")
    with Runtime(bundle_copy) as again:
        assert [adapter.name for adapter in again.adapters] == ["sums", "email", "parrot"]


EDITS = """
import sys
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.runtime.adapters.edit import add_skill, remove_skill
from dlp_edge.runtime.routing.policy import load_router
bundle = open_bundle(sys.argv[1])
router = load_router(bundle)
print("ready", flush=True)
while True:
    bundle = add_skill(bundle, router, "parrot", sys.argv[2])
    bundle = remove_skill(bundle, router, "parrot")
"""


def test_loading_while_another_process_adds_and_removes(bundle_copy: Path, parrot: Path) -> None:
    editor = subprocess.Popen(
        [sys.executable, "-c", EDITS, str(bundle_copy), str(parrot)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert editor.stdout is not None
    assert editor.stdout.readline() == "ready\n"
    try:
        loaded = 0
        for attempt in range(64):
            if attempt >= 16 and loaded >= 8:
                break
            # Busy is an answer, too, where the other process is faster on a busy machine.
            with contextlib.suppress(BusyError), Runtime(bundle_copy, threads=1) as runtime:
                assert len(runtime.adapters) in (3, 4)
                loaded += 1
        assert loaded >= 8
        assert editor.poll() is None
    finally:
        editor.kill()
        editor.communicate()


def test_reading_an_edition_again(bundle_copy: Path, parrot: Path) -> None:
    seen: list[int] = []

    def read(bundle: Bundle, changes: int) -> int:
        seen.append(bundle.manifest.edition)
        if len(seen) <= changes:
            router = load_router(bundle)
            if len(bundle.manifest.adapters) == 3:
                add_skill(bundle, router, "parrot", parrot)
            else:
                remove_skill(bundle, router, "parrot")
        bundle.adapters()
        return len(bundle.manifest.adapters)

    assert read_current(bundle_copy, lambda bundle: read(bundle, 2)) == 3
    assert seen == [0, 1, 2]
    with pytest.raises(BusyError, match="keeps changing"):
        read_current(bundle_copy, lambda bundle: read(bundle, 100))
    data = bundle_copy / TOKENIZER
    data.write_bytes(data.read_bytes()[:-1] + b" ")
    seen.clear()
    with pytest.raises(BundleError, match="tokenizer"):
        read_current(bundle_copy, lambda bundle: (seen.append(0), bundle.tokenizer(TOKENIZER)))
    assert seen == [0]
