"""The server under load: many clients at once, a second turn, and a soak with faults.

    python benchmarks/serving.py load BUNDLE [--clients 16] [--tokens 64]
    python benchmarks/serving.py load --url http://127.0.0.1:8080/v1 --model NAME --clients 8
    python benchmarks/serving.py turns BUNDLE
    python benchmarks/serving.py soak BUNDLE [--clients 64] [--minutes 10]

`load` asks one after another, all at once of a server that answers one at a time
(`--max-parallel 1`), and all at once of one that batches; with `--url`, of a server that runs
already, such as llama-server. `turns` compares the first token of a second turn with that of the
same conversation asked cold. `soak` cancels, disconnects, reads slowly and sends what is too large,
and compares every whole answer with the one that the request gets alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil

PROMPTS = (
    "How many are 28 shells and 10 shells?",
    "Mail Leo that lunch is at 12.",
    "Say hello, please.",
    "Tell me a story about a lighthouse.",
    "What is the capital of France?",
    "Write a poem about rain.",
    "List three fruits.",
    "Explain gravity to a child.",
)
TEXT = "The lighthouse stood on the cliff and the keeper wrote in his book every day. " * 62
FAULTS = ("disconnect", "slow reader", "oversized", "wrong")
LONGEST_BODY = 1 << 20
DIFFERENT = 16  # requests of a soak


@dataclass
class Answered:
    """An answer as a client saw it."""

    text: str = ""
    first: float = 0.0  # seconds to the first piece of text
    seconds: float = 0.0
    pieces: int = 0
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return int(self.usage.get("completion_tokens", self.pieces))


@contextlib.contextmanager
def serving(bundle: str, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """The base URL of a server in a process of its own."""
    command = [sys.executable, "-m", "dlp_edge.cli.main", "serve", bundle, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], pause: float = 0.0, most: int = 1 << 30
) -> Answered:
    """Streams an answer; reads a piece every `pause` seconds, and at most so many."""
    found, started = Answered(), time.perf_counter()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise RuntimeError(f"{response.status_code}: {response.text[:200]}")
        async for document in _events(response):
            found.usage = document.get("usage") or found.usage
            for choice in document["choices"]:
                piece = choice["delta"].get("content") or ""
                found.first = found.first or (time.perf_counter() - started if piece else 0.0)
                found.text += piece
                found.pieces += bool(piece)
            if pause:
                await asyncio.sleep(pause)
            if found.pieces >= most:
                break
    found.seconds = time.perf_counter() - started
    return found


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            document = json.loads(line[6:])
            if "error" in document:
                raise RuntimeError(str(document["error"]))
            yield document


def connect(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False)


async def bodies(client: httpx.AsyncClient, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A request per client, with fusions as different as the bundle has adapters."""
    names = [args.model]
    if args.model is None:
        listed = (await client.get("models")).json()["data"]
        names = [model["id"] for model in listed]
    return [
        {
            "model": names[index % len(names)],
            "messages": [{"role": "user", "content": PROMPTS[index % len(PROMPTS)]}],
            "max_tokens": args.tokens,
            "temperature": 0,
            **({"dlp_edge": {"repetition_stop": False}} if args.url is None else {}),
        }
        for index in range(args.clients)
    ]


def report(name: str, answers: Sequence[Answered], seconds: float) -> tuple[float, int]:
    first = [answer.first for answer in answers]
    tokens = sum(answer.tokens for answer in answers)
    rate = tokens / seconds
    print(
        f"{name}: {tokens} tokens, {rate:.1f} tokens/s, first token p50 {median(first):.2f} s, "
        f"p95 {np.percentile(first, 95):.2f} s, slowest over median "
        f"{max(a.seconds for a in answers) / median(a.seconds for a in answers):.2f}",
        flush=True,
    )
    return rate, tokens


async def in_turn(url: str, args: argparse.Namespace) -> tuple[float, int]:
    async with connect(url) as client:
        asked = await bodies(client, args)
        await ask(client, {**asked[0], "max_tokens": 2})
        started = time.perf_counter()
        answers = [await ask(client, body) for body in asked]
        return report("one after another", answers, time.perf_counter() - started)


async def at_once(url: str, args: argparse.Namespace, name: str) -> tuple[float, int]:
    async with connect(url) as client:
        asked = await bodies(client, args)
        await ask(client, {**asked[0], "max_tokens": 2})
        started = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, body) for body in asked))
        return report(name, answers, time.perf_counter() - started)


def load(args: argparse.Namespace) -> None:
    if args.url is not None:
        asyncio.run(in_turn(args.url, args))
        asyncio.run(at_once(args.url, args, f"{args.clients} at once"))
        return
    in_line = ("--max-parallel", "1", "--max-waiting", "64")
    with serving(args.bundle, *in_line, *args.options) as (url, process):
        before = _cpu_seconds(process)
        alone, tokens = asyncio.run(in_turn(url, args))
        alone_cpu = (_cpu_seconds(process) - before) / tokens
        asyncio.run(at_once(url, args, f"{args.clients} in line"))
    with serving(args.bundle, *args.options) as (url, process):
        before = _cpu_seconds(process)
        batched, tokens = asyncio.run(at_once(url, args, f"{args.clients} side by side"))
        batched_cpu = (_cpu_seconds(process) - before) / tokens
    print(
        f"side by side over one after another: {batched / alone:.2f}; processor time per token "
        f"{1e3 * alone_cpu:.2f} and {1e3 * batched_cpu:.2f} ms, {alone_cpu / batched_cpu:.2f} times"
    )


def _cpu_seconds(process: psutil.Process) -> float:
    """Steadier than the clock on a machine that others use, with `--threads 1`: a thread that
    waits for another one spins."""
    times = process.cpu_times()
    return float(times.user + times.system)


def turns(args: argparse.Namespace) -> None:
    async def measure(url: str) -> list[tuple[Answered, Answered]]:
        found = []
        async with connect(url) as client:
            name = (await client.get("models")).json()["data"][-1]["id"]
            for run in range(3):
                said = [{"role": "user", "content": f"Text {run}. {TEXT}"}]
                body = {"model": name, "messages": said, "max_tokens": 30}
                first = await ask(client, body)
                said += [
                    {"role": "assistant", "content": first.text},
                    {"role": "user", "content": "What is it about?"},
                ]
                found.append((first, await ask(client, body)))
        return found

    with serving(args.bundle, *args.options) as (url, _):
        for cold, warm in asyncio.run(measure(url)):
            print(
                f"second turn of {warm.usage['prompt_tokens']} tokens: first token after "
                f"{1e3 * warm.first:.0f} ms, cold {1e3 * cold.first:.0f} ms "
                f"({warm.first / cold.first:.1%}); {warm.usage.get('prompt_tokens_details')}"
            )


@dataclass
class Soak:
    """What a soak counted."""

    outcomes: Counter[str] = field(default_factory=Counter)
    differences: list[float] = field(default_factory=list)  # equal part of an answer that differs
    seconds: list[float] = field(default_factory=list)  # of whole answers, per token
    memory: list[int] = field(default_factory=list)


async def one_client(
    client: httpx.AsyncClient,
    asked: list[tuple[dict[str, Any], str]],
    found: Soak,
    process: psutil.Process,
    until: float,
    chance: random.Random,
) -> None:
    while time.monotonic() < until:
        body, alone = chance.choice(asked)
        kind = chance.choice(FAULTS) if chance.random() < 0.4 else "whole"
        try:
            if kind == "oversized":
                content = json.dumps({**body, "pad": "x" * (LONGEST_BODY + 1)}).encode()
                headers = {"Content-Type": "application/json"}
                status = (
                    await client.post("chat/completions", content=content, headers=headers)
                ).status_code
                kind += "" if status == 413 else f" answered {status}"
            elif kind == "wrong":
                wrong = chance.choice([{"temperature": -1}, {"model": "a/../b"}, {"stop": [""]}])
                status = (await client.post("chat/completions", json={**body, **wrong})).status_code
                kind += "" if status in (400, 404) else f" answered {status}"
            elif kind == "disconnect":
                await ask(client, body, most=chance.randrange(1, 12))
            else:
                pause = 0.15 if kind == "slow reader" else 0.0
                answer = await ask(client, body, pause=pause)
                if not pause:
                    found.seconds.append(answer.seconds / max(1, answer.tokens))
                if answer.text != alone:
                    pairs = zip(answer.text, alone, strict=False)
                    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(alone))
                    found.differences.append(same / max(1, len(alone)))
        except RuntimeError as error:
            kind = "429" if str(error).startswith("429") else f"error {str(error)[:60]}"
            await asyncio.sleep(0.5)
        except httpx.RemoteProtocolError:
            kind += ", connection closed"
        found.outcomes[kind] += 1
        found.memory.append(process.memory_info().rss)


async def soak_clients(url: str, process: psutil.Process, args: argparse.Namespace) -> Soak:
    found = Soak()
    async with connect(url) as client:
        different = (await bodies(client, args))[:DIFFERENT]
        asked = [(body, (await ask(client, body)).text) for body in different]
        until = time.monotonic() + 60 * args.minutes
        await asyncio.gather(
            *(
                one_client(client, asked, found, process, until, random.Random(seed))
                for seed in range(args.clients)
            )
        )
        health = (await client.get("../health")).status_code
    print(f"server alive: {health == 200}")
    return found


def soak(args: argparse.Namespace) -> None:
    with serving(args.bundle, *args.options) as (url, process):
        found = asyncio.run(soak_clients(url, process, args))
    for kind, count in found.outcomes.most_common():
        print(f"{count:6}  {kind}")
    whole = len(found.seconds)
    print(f"whole answers: {whole}, of them other than alone: {len(found.differences)}")
    if found.differences:
        shares = np.percentile(found.differences, [10, 50, 90])
        print("equal before the first difference, p10 p50 p90:", np.round(shares, 2))
    print(f"slowest over median: {max(found.seconds) / median(found.seconds):.2f}")
    quarters = [np.mean(part) / 1e6 for part in np.array_split(found.memory, 4)]
    print("MB in each quarter of the run:", ", ".join(f"{size:.0f}" for size in quarters))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    for name, run in {"load": load, "turns": turns, "soak": soak}.items():
        verb = verbs.add_parser(name)
        verb.add_argument("bundle", nargs="?")
        verb.add_argument("--url", help="a server that runs already")
        verb.add_argument("--model", help="its model")
        verb.add_argument("--clients", type=int, default=64 if name == "soak" else 16)
        verb.add_argument("--tokens", type=int, default=64)
        verb.add_argument("--minutes", type=float, default=10.0)
        verb.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of serve")
        verb.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
