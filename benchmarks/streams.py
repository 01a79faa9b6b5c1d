"""Cancelling, the second turn of a chat, and many threads, on a real bundle.

    python benchmarks/streams.py BUNDLE

Prints how long a stream lives on after `cancel()` while it decodes and inside a prefill of 2,000
tokens, the time to the first token of a chat's second turn beside that of a cold one, and whether
8 threads with 25 requests each, some of them cancelled, get the answers that each request gets
alone, in level memory.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from dlp_edge import Runtime, Stream
from tests.testing.hammer import hammer

STORY = "Tell me a very long story about a lighthouse and its keeper."
WEATHER = "The lighthouse stood on the cliff and the keeper wrote in his book every day. "
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("How many are 28 shells and 10 shells?", {"max_new_tokens": 60}),
    ("Mail Leo that lunch is at 12. And then: How many are 2 and 3?", {"max_new_tokens": 80}),
    ("Say hello, please.", {"max_new_tokens": 30, "kv": "recompute"}),
    ("Tell me a story.", {"adapters": {}, "max_new_tokens": 30, "temperature": 0.8, "seed": 3}),
]


def after_cancel(stream: Stream, delay: float) -> float:
    """Seconds from `cancel()`, called from another thread after a delay, to the stream's end."""
    cancelled: list[float] = []

    def cancel() -> None:
        time.sleep(delay)
        cancelled.append(time.perf_counter())
        stream.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    for _ in stream:
        pass
    ended = time.perf_counter()
    thread.join()
    if stream.reply.finish_reason != "cancelled":
        raise RuntimeError("the answer was complete before it was cancelled")
    return ended - cancelled[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    arguments = parser.parse_args()
    with Runtime(arguments.bundle, max_context=3000) as runtime:
        cancelling(runtime)
        second_turn(runtime)
        wrong, memory = hammer(runtime, PROMPTS, threads=8, requests=25)
    quarters = [np.mean(part) / 1e6 for part in np.array_split(memory, 4)]
    print(f"8 threads x 25 requests: {len(wrong)} wrong answers; MB in each quarter of the run:")
    print("  " + ", ".join(f"{megabytes:.1f}" for megabytes in quarters))


def cancelling(runtime: Runtime) -> None:
    chance = random.Random(0)
    steps: list[float] = []
    decoding: list[float] = []
    for seed in range(60):
        options: dict[str, Any] = {"adapters": {}, "temperature": 0.9, "seed": seed}
        stream = runtime.stream(STORY, max_new_tokens=200, **options)
        times = [(next(stream), time.perf_counter())[1] for _ in range(5)]
        steps += np.diff(times).tolist()
        decoding.append(after_cancel(stream, chance.uniform(0, 0.02)))
    prefilling = [
        after_cancel(runtime.stream("word " * 1990, adapters={}), chance.uniform(0.05, 0.8))
        for _ in range(20)
    ]
    print(f"one decode step: {1e3 * np.median(steps):.1f} ms (median)")
    for name, found in (("decoding", decoding), ("a prefill of 2,000 tokens", prefilling)):
        p50, p99 = 1e3 * np.percentile(found, [50, 99])
        print(f"from cancel to the end while {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")


def second_turn(runtime: Runtime) -> None:
    name = runtime.adapters[0].name
    for _ in range(3):
        chat = runtime.session()
        chat.send("Here is a text. " + WEATHER * 62, adapters=name, max_new_tokens=30)
        warm = chat.send("What is it about?", adapters=name, max_new_tokens=60)
        cold = runtime.generate(list(chat.messages[:-1]), adapters=name, max_new_tokens=60)
        first, second = (1e3 * reply.timings.first_token for reply in (cold, warm))
        print(
            f"second turn of a chat of {cold.usage.prompt_tokens} tokens: first token after "
            f"{second:.0f} ms, cold {first:.0f} ms ({second / first:.1%}); the answers are "
            f"{'equal' if warm.text == cold.text else 'different'}"
        )


if __name__ == "__main__":
    main()
