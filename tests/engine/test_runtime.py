"""`Runtime` on the tiny bundle: the real engine, random weights."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import dlp_edge
from dlp_edge import (
    BusyError,
    ContextLengthError,
    DeviceError,
    DlpEdgeError,
    Runtime,
    UsageError,
)


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Runtime:
    return Runtime(tiny_bundle, max_context=256)


def test_generates_and_streams_the_same(runtime: Runtime) -> None:
    reply = runtime.generate("Select the name", max_new_tokens=20)
    assert reply.usage.completion_tokens == 20
    assert reply.finish_reason == "length"
    stream = runtime.stream("Select the name", max_new_tokens=20)
    assert "".join(chunk.text for chunk in stream) == reply.text == stream.reply.text
    assert "".join(sentence.text for sentence in reply.sentences) == reply.text


def test_routes_to_a_known_adapter(runtime: Runtime) -> None:
    decision = runtime.route("Select the city of row 12")
    assert sum(decision.probabilities.values()) == pytest.approx(1)
    assert max(decision.probabilities, key=lambda n: decision.probabilities[n]) == "sql"
    assert sum(decision.weights.values()) == pytest.approx(1)


def test_selection_options_are_per_request(runtime: Runtime) -> None:
    text = "Select the city of row 12"
    assert len(runtime.route(text, select="top_k", k=3).selected) == 3
    assert runtime.route(text, min_confidence=1.0).weights == {}
    forbidden = runtime.route(text, forbid=["sql"])
    assert set(forbidden.probabilities) == {"sums", "email"}
    assert runtime.route(text, forbid=["sql", "sums", "email"]).weights == {}


def test_adapters_change_the_answer_and_the_base_comes_back(runtime: Runtime) -> None:
    base = runtime.generate("Hello", adapters={}, max_new_tokens=30).text
    pinned = runtime.generate("Hello", adapters="sql", max_new_tokens=30).text
    assert pinned != base
    assert runtime.generate("Hello", adapters={}, max_new_tokens=30).text == base


def test_seeds(runtime: Runtime) -> None:
    def sample(seed: int) -> str:
        return runtime.generate("Hello", temperature=1.0, seed=seed, max_new_tokens=20).text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_chat_messages(runtime: Runtime) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Select the name"},
    ]
    assert runtime.generate(messages, max_new_tokens=5).usage.prompt_tokens > len("Be brief.")


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("", {}),
        (" \n", {}),
        ([], {}),
        ([{"role": "user"}], {}),
        ("x", {"adapters": "nothing"}),
        ("x", {"adapters": {"sql": float("inf")}}),
        ("x", {"forbid": ["nothing"]}),
        ("x", {"max_new_tokens": 0}),
        ("x", {"temperature": -1}),
        ("x", {"top_p": 0}),
        ("x", {"top_k": -1}),
        ("x", {"stop": [""]}),
        ("x", {"kv": "drop"}),
        ("x", {"route_every": "token"}),
        ("x", {"inertia": 1.0}),
        ("x", {"inertia": -0.1, "adapters": "sql"}),
        ("x", {"select": "best"}),
        ("x", {"p": 2}),
        ("x", {"beams": 4}),
        (None, {}),
        (b"x", {}),
        ([1], {}),
        ([{"role": "user", "content": ["x"]}], {}),
        ("a\udc80b", {}),
        ("x", {"seed": -1}),
        ("x", {"seed": 1.5}),
        ("x", {"temperature": None}),
        ("x", {"temperature": float("nan")}),
        ("x", {"top_k": 1.5}),
        ("x", {"max_new_tokens": "5"}),
        ("x", {"stop": [1]}),
        ("x", {"stop": 1}),
        ("x", {"p": "0.5"}),
        ("x", {"adapters": 5}),
        ("x", {"adapters": {"sql": 1e300}}),
        ("x", {"adapters": "sql", "p": float("nan")}),
        ("x", {"adapters": "sql", "forbid": ["nothing"]}),
    ],
)
def test_bad_requests_are_usage_errors(
    runtime: Runtime, prompt: object, options: dict[str, object]
) -> None:
    with pytest.raises(UsageError) as caught:
        runtime.generate(prompt, **options)  # type: ignore[arg-type]
    assert caught.value.cause
    assert caught.value.remedy


def test_none_leaves_an_option_out(runtime: Runtime) -> None:
    reply = runtime.generate("x", stop=None, forbid=None, adapters=None, max_new_tokens=2)  # type: ignore[arg-type]
    assert reply.usage.completion_tokens <= 2


def test_extreme_numbers_stay_finite(runtime: Runtime) -> None:
    weight = np.float32(0.5)
    options = {"temperature": 1e-320, "seed": 0, "max_new_tokens": 5}
    cold = runtime.generate("Hello", adapters={"sql": weight}, **options)
    greedy = runtime.generate("Hello", adapters={"sql": 0.5}, max_new_tokens=5)
    assert cold.text == greedy.text


def test_a_waiting_stream_can_be_cancelled(runtime: Runtime) -> None:
    first = runtime.stream("Hello", max_new_tokens=50)
    next(first)
    waiting = runtime.stream("Hello", max_new_tokens=50)
    thread = threading.Thread(target=lambda: list(waiting))
    thread.start()
    waiting.cancel()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert waiting.reply.finish_reason == "cancelled"
    first.close()


def test_closing_does_not_wait_for_a_consumer_that_sleeps(tiny_bundle: Path) -> None:
    rt = Runtime(tiny_bundle)
    stream, asleep, wake = rt.stream("Hello"), threading.Event(), threading.Event()

    def consume() -> None:
        next(stream)
        asleep.set()
        wake.wait(20)

    thread = threading.Thread(target=consume)
    thread.start()
    asleep.wait(20)
    closing = threading.Thread(target=rt.close)
    closing.start()
    closing.join(timeout=5)
    assert not closing.is_alive()
    wake.set()
    thread.join()


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(UsageError("cause", "Remedy")))
    assert (type(error), error.cause, error.remedy) == (UsageError, "cause", "Remedy")


def test_a_prompt_longer_than_the_context(runtime: Runtime) -> None:
    with pytest.raises(ContextLengthError, match="256"):
        runtime.generate("x" * 300)


def test_an_answer_stops_at_the_end_of_the_context(runtime: Runtime) -> None:
    reply = runtime.generate("x" * 200, max_new_tokens=1000)
    assert reply.finish_reason in ("length", "stop")
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens <= 257


def test_cancel_from_another_thread(runtime: Runtime) -> None:
    stream = runtime.stream("Hello", max_new_tokens=200)
    first = next(stream)
    canceller = threading.Thread(target=stream.cancel)
    canceller.start()
    canceller.join()
    rest = list(stream)
    assert stream.reply.finish_reason == "cancelled"
    assert stream.reply.text.startswith(first.text)
    assert len(rest) <= 1


def test_threads_wait_for_each_other(runtime: Runtime) -> None:
    expected = {n: runtime.generate(f"Hello {n}", max_new_tokens=10).text for n in range(4)}
    found: dict[int, str] = {}

    def ask(n: int) -> None:
        found[n] = runtime.generate(f"Hello {n}", max_new_tokens=10).text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_stream_inside_a_stream_is_answered_beside_it(runtime: Runtime) -> None:
    whole, other = (runtime.generate(p, max_new_tokens=9).text for p in ("Hello", "And you?"))
    stream = runtime.stream("Hello", max_new_tokens=9)
    text = next(stream).text
    assert runtime.generate("And you?", max_new_tokens=9).text == other
    assert text + "".join(chunk.text for chunk in stream) == whole


def test_a_score_inside_a_stream_is_busy_and_not_a_deadlock(runtime: Runtime) -> None:
    stream = runtime.stream("Hello", max_new_tokens=5)
    next(stream)
    with pytest.raises(BusyError):
        runtime.score("Hello", ["there"])
    list(stream)
    assert runtime.score("Hello", ["there"])


def test_an_abandoned_stream_frees_the_runtime(runtime: Runtime) -> None:
    stream = runtime.stream("Hello", max_new_tokens=50)
    next(stream)
    del stream
    runtime.generate("Hello", max_new_tokens=2)


def test_closing_ends_an_unfinished_stream(tiny_bundle: Path) -> None:
    with Runtime(tiny_bundle) as rt:
        stream = rt.stream("Hello", max_new_tokens=50)
        begun = next(stream)
        untouched = rt.stream("Hello")
    assert list(stream) == []
    assert list(untouched) == []
    assert untouched.reply.text == ""
    assert stream.reply.finish_reason == "cancelled"
    assert stream.reply.text.startswith(begun.text)


def test_closing_a_stream_frees_the_runtime(runtime: Runtime) -> None:
    stream = runtime.stream("Hello", max_new_tokens=50)
    next(stream)
    stream.close()
    runtime.generate("Hello", max_new_tokens=2)


def test_load_progress_and_close(tiny_bundle: Path) -> None:
    told: list[tuple[str, float]] = []
    with Runtime(tiny_bundle, on_progress=lambda *at: told.append(at)) as rt:
        assert [adapter.name for adapter in rt.adapters] == ["sums", "sql", "email"]
        assert all(adapter.routed for adapter in rt.adapters)
    assert told[-1] == ("ready", 1.0)
    assert [fraction for _, fraction in told] == sorted(fraction for _, fraction in told)
    with pytest.raises(UsageError, match="closed"):
        rt.generate("Hello")


def test_devices(tiny_bundle: Path) -> None:
    with pytest.raises(DeviceError, match="exported for cpu"):
        Runtime(tiny_bundle, device="cuda")
    with pytest.raises(UsageError, match="device"):
        Runtime(tiny_bundle, device="tpu")
    with pytest.raises(UsageError, match="threads"):
        Runtime(tiny_bundle, threads=0)


def test_every_error_has_an_exit_code() -> None:
    codes = {kind.__name__: kind.exit_code for kind in _subclasses(DlpEdgeError)}
    assert codes["UsageError"] == codes["ContextLengthError"] == 2
    assert codes["BundleError"] == codes["AdapterError"] == codes["RouterError"] == 3
    assert codes["ResourceError"] == codes["DeviceError"] == codes["BusyError"] == 4


def _subclasses(kind: type[DlpEdgeError]) -> list[type[DlpEdgeError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _subclasses(child))]


HEAVY = "torch transformers peft onnx onnxruntime_genai bitsandbytes optimum scipy".split()


def test_importing_pulls_in_no_engine() -> None:
    code = "import dlp_edge, sys; print([m for m in ('onnxruntime', *%r) if m in sys.modules])"
    assert _python(code % HEAVY) == "[]"


def test_a_whole_generation_pulls_in_nothing_heavy(tiny_bundle: Path) -> None:
    code = (
        "import sys; from dlp_edge import Runtime\n"
        f"with Runtime({str(tiny_bundle)!r}) as rt: rt.generate('Hello', max_new_tokens=20)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert _python(code) == "[]"


def test_public_names_resolve() -> None:
    for name in dlp_edge.__all__:
        assert getattr(dlp_edge, name) is not None
    with pytest.raises(AttributeError):
        dlp_edge.nothing  # noqa: B018


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
