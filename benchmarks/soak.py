"""Hours of mixed requests on one Runtime: does its memory stay level?

    python benchmarks/soak.py BUNDLE --adapter NAME=DIR [--sentences 10000] [--hours 2] [--plot PNG]

Works on a copy of the bundle. Streams, cancelled streams, batches, conversations (saved, loaded,
branched), JSON answers, pinned and sampled ones, callbacks that raise, wrong requests, and an
adapter that is added and removed again and again, until there are so many sentences or the hours
are over. Prints a line for each tenth of the run and the drift of memory over its last half.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dlp_edge import Reply, Runtime
from dlp_edge.errors import UsageError

PROMPTS = (
    "Mia has {n} shells and gives {m} to Leo. How many shells does Mia have now?",
    "Write an SQL query for the name of all customers with age above {n}.",
    "Write a short email to Grace: the report is due on day {m}.",
    "The film starts at 19:{n} and takes {m} minutes. When is it over?",
    "Mail Leo that lunch is at {m}. And then: Say it like a pirate: Where are the {n} coins?",
    "Tell me something about the number {n}.",
)
NEW_SKILL = [f"Write an SQL query for the price of all books after {year}." for year in range(20)]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
CHANGE_EVERY = 50  # requests between two changes of the bundle
TENTHS = 10


@dataclass
class Record:
    """The measurements of a run: (seconds, sentences, resident bytes) after every request."""

    points: list[tuple[float, int, int]] = field(default_factory=list)
    sentences: int = 0
    tokens: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def take(self, reply: Reply) -> None:
        self.sentences += len(reply.sentences)
        self.tokens += reply.usage.completion_tokens


class Mix:
    """Makes seeded random requests of every kind."""

    def __init__(self, runtime: Runtime, scratch: Path, record: Record, tokens: int) -> None:
        self._runtime = runtime
        self._scratch = scratch
        self._record = record
        self._tokens = tokens
        self._chance = random.Random(0)
        self._kinds: tuple[Callable[[], None], ...] = (
            self.stream,
            self.cancelled,
            self.batch,
            self.conversation,
            self.as_json,
            self.pinned,
            self.sampled,
            self.recomputed,
            self.raising,
            self.wrong,
        )

    def request(self) -> None:
        """One request, or one conversation of some."""
        kind = self._chance.choice(self._kinds)
        self._record.kinds[kind.__name__] += 1
        kind()

    def stream(self) -> None:
        self._finish(self._runtime.stream(self._prompt(), max_new_tokens=self._tokens))

    def cancelled(self) -> None:
        stream = self._runtime.stream(self._prompt(), max_new_tokens=self._tokens)
        left = self._chance.randrange(1, self._tokens)
        for _ in stream:
            left -= 1
            if left == 0:
                stream.cancel()
        self._record.take(stream.reply)

    def batch(self) -> None:
        prompts = [self._prompt() for _ in range(self._chance.randint(2, 4))]
        for reply in self._runtime.generate_batch(prompts, max_new_tokens=self._tokens):
            self._record.take(reply)

    def conversation(self) -> None:
        chat = self._runtime.session(system="Be brief.", overflow="drop_oldest")
        for _ in range(self._chance.randint(1, 4)):
            self._record.take(chat.send(self._prompt(), max_new_tokens=self._tokens))
        if len(chat.messages) > 1:  # empty answers are not remembered
            self._finish(chat.regenerate(max_new_tokens=self._tokens, temperature=0.9, seed=1))
        twin = chat.branch()
        self._record.take(twin.send(self._prompt(), max_new_tokens=self._tokens))
        chat.save(self._scratch / "chat.json")
        loaded = self._runtime.load_session(self._scratch / "chat.json")
        self._record.take(loaded.send("And now?", max_new_tokens=self._tokens))

    def as_json(self) -> None:
        self._generate(json_schema=SCHEMA)

    def pinned(self) -> None:
        names = [adapter.name for adapter in self._runtime.adapters]
        some = self._chance.sample(names, self._chance.randint(0, min(3, len(names))))
        self._generate(adapters={name: 1 / len(some) for name in some})

    def sampled(self) -> None:
        self._generate(temperature=0.9, top_p=0.95, seed=self._chance.randrange(999), logprobs=3)

    def recomputed(self) -> None:
        self._runtime.route(self._prompt(), generated="First. Then")
        self._generate(kv="recompute", select="top_k", k=2)

    def raising(self) -> None:
        class Enough(Exception):  # noqa: N818
            pass

        def stop(*_: object) -> None:
            raise Enough

        try:
            self._generate(on_route=stop)
        except Enough:
            return
        raise RuntimeError("a callback's exception was lost")

    def wrong(self) -> None:
        for prompt, options in (("word " * 10_000, {}), ("x", {"adapters": "?"}), ("", {})):
            try:
                self._runtime.generate(prompt, **options)  # type: ignore[arg-type]
            except UsageError:
                continue
            raise RuntimeError(f"a wrong request was answered: {prompt[:9]!r} {options}")

    def _generate(self, **options: Any) -> None:
        self._record.take(
            self._runtime.generate(self._prompt(), max_new_tokens=self._tokens, **options)
        )

    def _finish(self, stream: Any) -> None:
        self._record.take(stream.finish())

    def _prompt(self) -> str:
        n, m = self._chance.randint(10, 59), self._chance.randint(1, 28)
        return self._chance.choice(PROMPTS).format(n=n, m=m)


def soak(
    bundle: Path,
    adapter: tuple[str, Path],
    sentences: int,
    seconds: float,
    threads: int | None = None,
    tokens: int = 64,
    tell: Callable[[str], None] = lambda line: None,
) -> Record:
    """Runs the mix until there are so many sentences, or the seconds are over.

    Args:
        adapter: name and PEFT folder of what is added and removed all the time.
        tokens: the most of an answer.
        tell: called with a line now and then.
    """
    name, folder = adapter
    record, process = Record(), psutil.Process()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(bundle, Path(scratch) / "bundle"))
        with Runtime(copy, max_context=1024, threads=threads) as runtime:
            mix = Mix(runtime, Path(scratch), record, tokens)
            begun = time.perf_counter()
            requests = 0
            while record.sentences < sentences and time.perf_counter() - begun < seconds:
                if requests % CHANGE_EVERY == CHANGE_EVERY - 1:
                    change(runtime, name, folder)
                    record.kinds["change"] += 1
                mix.request()
                requests += 1
                resident = process.memory_info().rss
                record.points.append((time.perf_counter() - begun, record.sentences, resident))
                if requests % 100 == 0:
                    tell(f"{record.sentences} sentences, {resident / 1e6:.1f} MB")
    return record


def change(runtime: Runtime, name: str, folder: Path) -> None:
    """Remove the adapter, or add it if it is missing."""
    if name in (known.name for known in runtime.adapters):
        runtime.remove_adapter(name)
    else:
        runtime.add_adapter(name, folder, examples=NEW_SKILL)


def tenths(points: Sequence[tuple[float, int, int]]) -> list[dict[str, float]]:
    """The run in ten parts of as many requests each: sentences, seconds, mean and highest MB."""
    return [
        {
            "minutes": part[-1, 0] / 60,
            "sentences": part[-1, 1],
            "mean_mb": part[:, 2].mean() / 1e6,
            "highest_mb": part[:, 2].max() / 1e6,
        }
        for part in np.array_split(np.array(points, float), TENTHS)
    ]


def drift(points: Sequence[tuple[float, int, int]]) -> float:
    """How much a straight line through the last half of the run rises from its beginning to its
    end, over the mean, in per cent."""
    half = np.array(points, float)[len(points) // 2 :, 2]
    slope = np.polyfit(np.arange(len(half)), half, 1)[0]
    return float(100 * slope * (len(half) - 1) / half.mean())


def draw(points: Sequence[tuple[float, int, int]], out: Path) -> None:
    """Resident memory over the sentences, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = np.array(points, float)
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(data[:, 1], data[:, 2] / 1e6, linewidth=0.6)
    axes.set_xlabel("sentences")
    axes.set_ylabel("resident MB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapter", required=True, metavar="NAME=DIR")
    parser.add_argument("--sentences", type=int, default=10_000)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=64, help="the most of an answer")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--points", type=Path, metavar="JSON", help="every sample, for later")
    arguments = parser.parse_args()
    name, _, folder = arguments.adapter.partition("=")
    record = soak(
        arguments.bundle,
        (name, Path(folder)),
        arguments.sentences,
        3600 * arguments.hours,
        arguments.threads,
        arguments.tokens,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.points:
        arguments.points.write_text(json.dumps(record.points))
    if arguments.plot:
        draw(record.points, arguments.plot)
    print(f"{'tenth':>5} {'minutes':>8} {'sentences':>10} {'mean MB':>9} {'highest MB':>11}")
    for number, row in enumerate(tenths(record.points), 1):
        print(
            f"{number:>5} {row['minutes']:>8.1f} {row['sentences']:>10.0f} "
            f"{row['mean_mb']:>9.1f} {row['highest_mb']:>11.1f}"
        )
    print("requests: " + ", ".join(f"{kind} {n}" for kind, n in sorted(record.kinds.items())))
    print(f"{record.sentences} sentences, {record.tokens} tokens")
    print(f"drift of the last half: {drift(record.points):+.2f} %")


if __name__ == "__main__":
    main()
