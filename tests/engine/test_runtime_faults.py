"""What goes wrong while a Runtime loads or answers, and that all is well afterwards.

The engine is the real one. A fault is put into one of its passes; then the same Runtime (and the
same session) must give the very answer that it gave before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dlp_edge import (
    BundleError,
    BusyError,
    Chunk,
    DeviceError,
    DeviceMemoryError,
    ResourceError,
    RouteDecision,
    Runtime,
    UsageError,
)
from dlp_edge.bundle.files import BACKBONE_DATA
from dlp_edge.errors import NonFiniteError, RouterError
from dlp_edge.runtime.engine import decoder
from dlp_edge.runtime.engine.bound_tensor import BoundTensor
from dlp_edge.runtime.engine.decoder import Decoder
from dlp_edge.runtime.fusion.copying import CopyingFuser
from dlp_edge.runtime.fusion.in_place import InPlaceFuser
from dlp_edge.runtime.options import GenerateOptions
from dlp_edge.runtime.stream import Stream

PROMPT = "Tom has 3 apples and buys 4. How many?"
BATCH = ["Hi", PROMPT, "Select the name of row 7"]
SHORT = GenerateOptions(max_new_tokens=6)

Run = Callable[[], None]
Ask = Callable[[], object]  # the same answer every time, unless something is wrong


@pytest.fixture(scope="module")
def runtime(either_bundle: Path) -> Iterator[Runtime]:
    with Runtime(either_bundle, threads=1) as runtime:
        yield runtime


@pytest.fixture
def bundle_copy(either_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(either_bundle, tmp_path / "copy"))


@pytest.fixture(scope="module")
def switching(runtime: Runtime) -> GenerateOptions:
    """Options under which the fusion changes inside the answer, and the cache is written anew."""
    turns = ("sums", "sql")
    for seed in range(2000):
        options = GenerateOptions(
            max_new_tokens=24,
            temperature=1.0,
            seed=seed,
            kv="recompute",
            on_route=lambda decision, text: turns[bool(text)],
        )
        reply = runtime.generate(PROMPT, **options)
        if reply.timings.switches and reply.timings.recompute:
            return options
    raise AssertionError("no answer has two sentences")


def _generate(runtime: Runtime, switching: GenerateOptions) -> Ask:
    return lambda: runtime.generate(PROMPT, **SHORT).text


def _recompute(runtime: Runtime, switching: GenerateOptions) -> Ask:
    return lambda: runtime.generate(PROMPT, **switching).text


def _stream(runtime: Runtime, switching: GenerateOptions) -> Ask:
    def ask() -> str:
        with runtime.stream(PROMPT, **SHORT) as stream:
            return "".join(chunk.text for chunk in stream)

    return ask


def _session(runtime: Runtime, switching: GenerateOptions) -> Ask:
    """The second turn of one session, again and again."""
    session = runtime.session(system="Be brief")
    session.send(PROMPT, **SHORT)
    said = session.messages

    def ask() -> str:
        try:
            reply = session.send("And then?", **SHORT)
        except BaseException:
            assert session.messages == said  # a turn that failed was not said
            raise
        assert len(session.messages) == len(said) + 2
        session._messages = list(said)
        return reply.text

    return ask


def _batch(runtime: Runtime, switching: GenerateOptions) -> Ask:
    each = [SHORT, switching, SHORT]

    def ask() -> list[str]:
        return [reply.text for reply in runtime.generate_batch(BATCH, each, max_batch=2)]

    return ask


WAYS = {
    "generate": _generate,
    "recompute": _recompute,
    "stream": _stream,
    "session": _session,
    "generate_batch": _batch,
}


@dataclass
class Trap:
    """Counts calls of a method, and does something else at one of them.

    Attributes:
        at: which call, from 1.
        act: called with the real method and its arguments: `run()` is what would have happened.
    """

    owner: type
    method: str
    at: int
    act: Callable[[Callable[[], Any], Any], Any]
    calls: int = 0

    @contextlib.contextmanager
    def set(self) -> Iterator[Trap]:
        real = getattr(self.owner, self.method)

        def called(owner: Any, *args: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                return self.act(partial(real, owner, *args, **named), owner)
            return real(owner, *args, **named)

        setattr(self.owner, self.method, called)
        try:
            yield self
        finally:
            setattr(self.owner, self.method, real)


def at_pass(number: int, act: Callable[[Run, Any], None]) -> Trap:
    """A trap in a pass of the backbone."""
    return Trap(ort.InferenceSession, "run_with_iobinding", number, act)


def passes_of(ask: Ask) -> int:
    with at_pass(0, lambda run, _: run()).set() as trap:
        ask()
    return trap.calls


def after(error: BaseException) -> Callable[[Run, Any], None]:
    """The pass happens, so the cache is written, and then it fails."""

    def act(run: Run, _: Any) -> None:
        run()
        raise error

    return act


def before(error: BaseException) -> Callable[[Run, Any], None]:
    def act(run: Run, _: Any) -> None:
        raise error

    return act


NO_ROOM = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for 123 bytes"
FAULTS: dict[str, tuple[Callable[[Run, Any], None], type[BaseException]]] = {
    "no memory in Python": (before(MemoryError()), ResourceError),
    "no memory in the engine": (after(RuntimeError(NO_ROOM)), ResourceError),
    "bad_alloc": (before(RuntimeError("std::bad_alloc")), ResourceError),
    "the engine fails": (after(RuntimeError("Non-zero status code")), BundleError),
    "an error without a word": (after(RuntimeError()), BundleError),
    "Ctrl-C": (after(KeyboardInterrupt()), KeyboardInterrupt),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_pass_that_fails_leaves_nothing_behind(
    runtime: Runtime, switching: GenerateOptions, way: str, fault: str
) -> None:
    """At every pass: prefill, each step, each recompute."""
    ask, plain = WAYS[way](runtime, switching), _generate(runtime, switching)
    expected, other = ask(), plain()
    act, error = FAULTS[fault]
    passes = passes_of(ask)
    assert passes >= SHORT["max_new_tokens"]
    for number in range(1, passes + 1):
        with at_pass(number, act).set() as trap, pytest.raises(error):
            ask()
        assert trap.calls == number
        assert ask() == expected
        assert plain() == other


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_that_are_not_finite_end_the_answer_and_no_other(
    runtime: Runtime, switching: GenerateOptions, way: str, value: float
) -> None:
    """Logits of token n, and the cache with them."""
    ask = WAYS[way](runtime, switching)
    expected = ask()

    def spoil(run: Run, decoder: Any) -> None:
        run()
        decoder._logits.host[...] = value
        for buffer in decoder._cache.values():
            buffer.host[...] = value

    passes = passes_of(ask)
    causes: list[str] = []
    for number in range(1, passes + 1):
        with Trap(Decoder, "_run", number, spoil).set():
            try:
                ask()
            except NonFiniteError as error:
                causes.append(error.cause)
        assert ask() == expected
    if way in ("generate", "stream", "session"):
        assert [cause.split(" after ")[1] for cause in causes] == [
            f"{number} tokens" for number in range(passes)
        ]
    else:  # nobody looks at the logits of a history that is read again, nor at places without use
        assert len(causes) > passes / 2


def test_a_cache_that_is_spoiled_between_two_turns_is_left_by_the_turn_that_finds_it(
    runtime: Runtime,
) -> None:
    """The engine itself makes NaN of it."""
    session, twin = runtime.session(), runtime.session()
    for each in (session, twin):
        each.send(PROMPT, **SHORT, adapters="sums")
    for buffer in runtime._open().caches.engine_of(session).decoder._cache.values():
        buffer.host[...] = np.nan
    with pytest.raises(NonFiniteError):
        session.send("And then?", **SHORT, adapters="sums")
    reply = session.send("And then?", **SHORT, adapters="sums")
    assert reply.text == twin.send("And then?", **SHORT, adapters="sums").text
    assert reply.timings.reused == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), ResourceError),
        (RuntimeError("std::bad_alloc"), ResourceError),
        (RuntimeError("Non-zero status code"), RouterError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("way", ["route", *WAYS])
def test_a_router_that_fails_leaves_nothing_behind(
    runtime: Runtime,
    switching: GenerateOptions,
    way: str,
    error: BaseException,
    expected: type[BaseException],
) -> None:
    """At every question that it is asked."""

    def route() -> RouteDecision:
        return runtime.route(PROMPT)

    ask: Ask = route if way == "route" else WAYS[way](runtime, switching)
    answer = ask()
    with Trap(ort.InferenceSession, "run", 0, before(error)).set() as trap:
        ask()
    assert trap.calls >= (2 if way in ("recompute", "generate_batch") else 1)
    for number in range(1, trap.calls + 1):
        with (
            Trap(ort.InferenceSession, "run", number, before(error)).set(),
            pytest.raises(expected),
        ):
            ask()
        assert ask() == answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "method", "ways"),
    [
        (CopyingFuser, "_ensure_rank", tuple(WAYS)),
        (CopyingFuser, "fuse", tuple(WAYS)),
        (InPlaceFuser, "_resize_tables", tuple(WAYS)),
        (InPlaceFuser, "fuse", tuple(WAYS)),
        (BoundTensor, "__init__", ("generate", "session", "generate_batch")),
        (BoundTensor, "bind_input", ("generate", "session", "generate_batch")),
    ],
)
def test_memory_that_runs_out_while_adapters_are_fused(
    runtime: Runtime, switching: GenerateOptions, owner: type, method: str, ways: tuple[str, ...]
) -> None:
    """Slot by slot: some have the new adapters then, others still the old ones."""
    if owner in (CopyingFuser, InPlaceFuser) and type(runtime._open().engine.fuser) is not owner:
        pytest.skip("these operators are fed by another fuser")
    no_room = before(MemoryError())
    for way in ways:
        ask = WAYS[way](runtime, switching)
        expected = ask()
        with Trap(owner, method, 0, no_room).set() as trap:
            ask()
        assert trap.calls
        for number in range(1, trap.calls + 1, 1 + trap.calls // 60):
            with Trap(owner, method, number, no_room).set(), pytest.raises(ResourceError):
                ask()
            assert ask() == expected


def test_memory_that_runs_out_before_the_first_pass(runtime: Runtime) -> None:
    expected = runtime.generate(PROMPT, **SHORT).text
    session = runtime.session()
    session.send(PROMPT, **SHORT)
    said = session.messages
    for owner, method in ((Decoder, "__init__"), (decoder, "make_cache"), (Decoder, "set_fusion")):
        asks: list[Ask] = [
            lambda: runtime.generate_batch([PROMPT], **SHORT),
            lambda: runtime.session().send(PROMPT, **SHORT),
            session.branch,
        ]
        for ask in asks:
            trap = Trap(owner, method, 1, before(MemoryError()))
            with trap.set(), pytest.raises(ResourceError):
                ask()
        assert session.messages == said
        assert runtime.generate(PROMPT, **SHORT).text == expected
        assert session.branch().send(PROMPT, **SHORT).text


def test_a_device_that_is_lost_is_said_and_a_new_runtime_answers(
    either_bundle: Path, runtime: Runtime
) -> None:
    """What onnxruntime says of it is put into a pass; here there is no device to lose."""
    expected = runtime.generate(PROMPT, **SHORT).text
    with Runtime(either_bundle, threads=1) as lost:
        decoder = lost._open().engine.decoder
        for said, error in (
            ("CUDA failure 700: an illegal memory access was encountered", DeviceError),
            ("CUDA failure 2: out of memory", DeviceMemoryError),
        ):

            def lose(step: Run, decoder: Any, said: str = said) -> None:
                decoder._kind = "cuda"  # a step allocates nothing there
                with at_pass(1, before(RuntimeError(said))).set():
                    step()

            with Trap(Decoder, "_run", 2, lose).set(), pytest.raises(error) as caught:
                lost.generate(PROMPT, **SHORT)
            decoder._kind = "cpu"
            assert type(caught.value) is error
    with Runtime(either_bundle, threads=1) as new:
        assert new.generate(PROMPT, **SHORT).text == expected


def test_a_provider_that_falls_back_is_a_device_error(
    either_bundle: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = runtime._open().backbone.session
    monkeypatch.setattr(type(session), "get_providers", lambda self: ["OtherExecutionProvider"])
    with pytest.raises(DeviceError, match="OtherExecutionProvider"):
        Runtime(either_bundle)
    monkeypatch.undo()
    with Runtime(either_bundle) as new:
        assert new.generate(PROMPT, **SHORT).text == runtime.generate(PROMPT, **SHORT).text


class OwnError(Exception):
    """Raised by an application's callback."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OwnError(), OwnError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), ResourceError),
        (StopIteration(), RuntimeError),
    ],
)
@pytest.mark.parametrize("way", ["generate", "stream", "session", "generate_batch"])
def test_a_callback_that_raises(
    runtime: Runtime,
    switching: GenerateOptions,
    way: str,
    error: BaseException,
    expected: type[BaseException],
) -> None:
    """`on_route`, at each of its calls; in a batch it belongs to one of the prompts."""
    count, at = 0, 0

    def on_route(decision: RouteDecision, text: str) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise error
        assert switching["on_route"] is not None
        return switching["on_route"](decision, text)

    own = GenerateOptions(**{**switching, "on_route": on_route})  # type: ignore[typeddict-item]
    session = runtime.session()
    session.send("Hello", **SHORT)
    said = session.messages

    def ask() -> object:
        nonlocal count
        count = 0
        if way == "generate_batch":
            replies = runtime.generate_batch(BATCH, [SHORT, own, SHORT], max_batch=2)
            return [reply.text for reply in replies]
        if way == "session":
            session._messages = list(said)
            return session.send(PROMPT, **own).text
        if way == "stream":
            return "".join(chunk.text for chunk in runtime.stream(PROMPT, **own))
        return runtime.generate(PROMPT, **own).text

    answer = ask()
    calls = count
    assert calls >= 1
    for number in range(1, calls + 1):
        at = number
        with pytest.raises(expected):
            ask()
        assert session.messages == said or way != "session"
        at = 0
        assert ask() == answer


def test_closing_inside_a_callback_is_refused_and_closing_later_works(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle, threads=1)
    with pytest.raises(BusyError):
        runtime.generate(PROMPT, **SHORT, on_route=lambda decision, text: runtime.close())
    runtime.close()
    with pytest.raises(UsageError, match="closed"):
        runtime.generate(PROMPT, **SHORT)


def _chunks(stream: Stream, count: int) -> list[Chunk]:
    return [chunk for _, chunk in zip(range(count), stream, strict=False)]


def test_a_consumer_that_raises_at_every_chunk(runtime: Runtime) -> None:
    expected = runtime.generate(PROMPT, **SHORT).text
    total = len(list(runtime.stream(PROMPT, **SHORT)))
    assert total >= 3

    def consume(at: int) -> None:
        with runtime.stream(PROMPT, **SHORT) as stream:
            _chunks(stream, at)
            raise OwnError

    for at in range(total + 1):
        with pytest.raises(OwnError):
            consume(at)
        assert runtime.generate(PROMPT, **SHORT).text == expected


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_ended_at_every_chunk(runtime: Runtime, how: str) -> None:
    """A stream, and the turn of a session: its next turn answers as one that was never read."""
    whole = runtime.generate(PROMPT, **SHORT)
    total = len(list(runtime.stream(PROMPT, **SHORT)))
    for at in range(total + 1):
        stream = runtime.stream(PROMPT, **SHORT)
        text = "".join(chunk.text for chunk in _chunks(stream, at))
        getattr(stream, how)()
        text += "".join(chunk.text for chunk in stream)  # what was held back, if anything
        assert stream.ended
        assert whole.text.startswith(stream.reply.text.rstrip("\ufffd"))
        assert stream.reply.text.startswith(text) or how == "cancel"
        assert runtime.generate(PROMPT, **SHORT).text == whole.text

        session = runtime.session()
        turn = session.stream(PROMPT, **SHORT)
        _chunks(turn, at)
        getattr(turn, how)()
        list(turn)
        assert turn.ended
        again = session.send("And then?", **SHORT)
        cold = runtime.session(messages=session.messages[:-2])
        assert again.text == cold.send("And then?", **SHORT).text


@pytest.mark.parametrize("sooner", [True, False])
def test_cancelled_in_every_pass(
    runtime: Runtime, switching: GenerateOptions, sooner: bool
) -> None:
    """Before the engine runs and after it has run, recomputed histories included."""
    whole = runtime.generate(PROMPT, **switching)
    passes = passes_of(_recompute(runtime, switching))
    for number in range(1, passes + 1):
        stream = runtime.stream(PROMPT, **switching)

        def act(run: Run, _: Any, stream: Stream = stream) -> None:
            if sooner:
                stream.cancel()
            run()
            stream.cancel()

        with at_pass(number, act).set() as trap:
            reply = stream.finish()
        assert trap.calls == number
        assert reply.finish_reason == "cancelled" or number == passes
        assert reply.usage.completion_tokens <= number
        assert whole.text.startswith(reply.text.rstrip("\ufffd"))
        assert runtime.generate(PROMPT, **switching).text == whole.text


@pytest.mark.slow
@pytest.mark.parametrize("way", ["generate", "session", "generate_batch"])
def test_a_runtime_closed_in_every_pass(
    runtime: Runtime, either_bundle: Path, switching: GenerateOptions, way: str
) -> None:
    """By another thread. The request under way ends, the next is refused, a new one answers."""
    expected = WAYS[way](runtime, switching)()
    passes = passes_of(WAYS[way](runtime, switching))
    for number in range(1, passes + 1, 1 + passes // 12):  # each one costs a load
        with Runtime(either_bundle, threads=1) as closed:
            ask = WAYS[way](closed, switching)
            closer = threading.Thread(target=closed.close)

            def act(run: Run, _: Any, closed: Runtime = closed, closer: Any = closer) -> None:
                closer.start()
                assert closed._closing._event.wait(10)
                run()

            with at_pass(number, act).set(), contextlib.suppress(AssertionError):
                ask()  # a session's turn that was cancelled in its prefill was not said
            closer.join(10)
            assert not closer.is_alive()
            with pytest.raises(UsageError, match="closed"):
                closed.generate(PROMPT)
    with Runtime(either_bundle, threads=1) as new:
        assert WAYS[way](new, switching)() == expected


def _damages(file: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    size = file.stat().st_size
    other = file.with_name("other")

    def replace() -> None:
        other.write_bytes(os.urandom(size))
        other.replace(file)

    yield "cut to half", lambda: os.truncate(file, size // 2)
    yield "emptied", lambda: os.truncate(file, 0)
    yield "replaced", replace
    yield "removed", file.unlink


@pytest.mark.slow
def test_files_damaged_while_a_runtime_is_loaded(bundle_copy: Path) -> None:
    """The loaded one answers on, a new one refuses them, and loads once they are whole again."""
    names = sorted(path.name for path in bundle_copy.iterdir())
    with Runtime(bundle_copy, threads=1) as runtime:
        expected = runtime.generate(PROMPT, **SHORT).text
        for name in names:
            file = bundle_copy / name
            good = file.read_bytes()
            for _, damage in _damages(file):
                damage()
                assert runtime.generate(PROMPT, **SHORT).text == expected
                assert runtime.session().send(PROMPT, **SHORT).text == expected
                if name != "report.json":  # which loading does not read
                    with pytest.raises(BundleError):
                        Runtime(bundle_copy)
                file.write_bytes(good)
    with Runtime(bundle_copy, threads=1) as runtime:
        assert runtime.generate(PROMPT, **SHORT).text == expected


@pytest.mark.slow
def test_weights_damaged_at_every_moment_of_loading(bundle_copy: Path, runtime: Runtime) -> None:
    """Either it is found, or what was read before it is what answers."""
    expected = runtime.generate(PROMPT, **SHORT).text
    file = bundle_copy / BACKBONE_DATA
    good = file.read_bytes()
    told: list[float] = []
    with Runtime(bundle_copy, on_progress=lambda stage, part: told.append(part)):
        pass
    outcomes = []
    for at in range(0, len(told), 1 + len(told) // 12):  # each one costs two loads
        for index in (0, 2):
            count = 0

            def tell(stage: str, part: float, at: int = at, index: int = index) -> None:
                nonlocal count
                if count == at:
                    [damage for _, damage in _damages(file)][index]()
                count += 1

            try:
                with Runtime(bundle_copy, threads=1, on_progress=tell) as loaded:
                    assert loaded.generate(PROMPT, **SHORT).text == expected
                    outcomes.append("loaded")
            except BundleError:
                outcomes.append("refused")
            file.write_bytes(good)
    assert {"loaded", "refused"} == set(outcomes)
    with Runtime(bundle_copy, threads=1) as again:
        assert again.generate(PROMPT, **SHORT).text == expected


def test_an_error_of_loading_holds_nothing_that_was_loaded(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the MemoryError that it came from."""
    import gc

    held = []

    class Large(np.ndarray[Any, Any]):
        pass

    def read(*_: object) -> None:
        large = np.zeros(10).view(Large)
        held.append(id(large))
        raise MemoryError

    monkeypatch.setattr("dlp_edge.runtime.runtime.load_on", read)
    with pytest.raises(ResourceError, match="not enough memory") as caught:
        Runtime(tiny_bundle)
    assert held
    assert caught.value.__cause__ is not None
    assert not [found for found in gc.get_objects() if isinstance(found, Large)]
    traces, frame = [], caught.value.__cause__.__traceback__
    while frame is not None:
        traces.append(frame.tb_frame.f_locals)
        frame = frame.tb_next
    assert not any("large" in variables for variables in traces)


LIMITED = """
import gc, json, resource, sys
import psutil
from dlp_edge import ResourceError, Runtime

PROMPT = "Tom has 3 apples. " * 20

def answer(runtime):
    return runtime.generate(PROMPT, max_new_tokens=4).text

def load():
    with Runtime(sys.argv[1], threads=1) as runtime:
        return answer(runtime)

def limited(spare, work):
    # The outcome of some work with so many bytes of address space left.
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        return "right" if work() else "wrong"
    except ResourceError:
        return "refused"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        gc.collect()

expected = load()
loads = [limited(spare << 18, lambda: load() == expected) for spare in range(0, 128, 8)]
after_loads = load() == expected
with Runtime(sys.argv[1], threads=1) as runtime:
    alone = [runtime.generate(PROMPT, max_new_tokens=4).text] * 64

    def batch():
        replies = runtime.generate_batch([PROMPT] * 64, max_new_tokens=4, max_batch=64)
        return [reply.text for reply in replies] == alone

    def sessions():
        open_ones = [runtime.session() for _ in range(64)]
        return [one.send(PROMPT, max_new_tokens=4).text for one in open_ones] == alone

    requests = [
        limited(spare << 20, work) for work in (batch, sessions) for spare in range(0, 64, 8)
    ]
    after_requests = answer(runtime) == expected and batch() and sessions()
print(json.dumps([loads, after_loads, requests, after_requests]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is not enforced elsewhere")
def test_address_space_that_really_runs_out(tiny_bundle: Path) -> None:
    """While loading and while answering, with a little more left each time."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tiny_bundle)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loads, after_loads, requests, after_requests = json.loads(done.stdout)
    assert set(loads) == {"refused", "right"}
    assert set(requests) == {"refused", "right"}
    assert loads[0] == "refused"
    assert loads[-1] == "right"
    assert after_loads
    assert after_requests


@pytest.mark.parametrize(
    "ask",
    [
        lambda runtime: runtime.session(messages=None),
        lambda runtime: runtime.session(messages=3),
        lambda runtime: runtime.generate_batch(None),
        lambda runtime: runtime.generate_batch(3),
        lambda runtime: runtime.generate_batch(BATCH[:1], each=[3]),
        lambda runtime: runtime.generate_batch(BATCH[:1], each=3),
        lambda runtime: runtime.generate(PROMPT, on_route=3),
        lambda runtime: runtime.generate(PROMPT, adapters={}, on_route=3),
        lambda runtime: runtime.session().edit("a", PROMPT),
    ],
)
def test_arguments_of_the_wrong_type(runtime: Runtime, ask: Callable[[Runtime], object]) -> None:
    with pytest.raises(UsageError):
        ask(runtime)


def test_load_arguments_of_the_wrong_type(tiny_bundle: Path) -> None:
    for wrong in ({"on_progress": 3}, {"threads": "two"}, {"threads": 0}):
        with pytest.raises(UsageError):
            Runtime(tiny_bundle, **wrong)  # type: ignore[arg-type]
