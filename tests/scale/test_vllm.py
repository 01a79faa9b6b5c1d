"""The front over real vLLM servers. `.ci/vllm` makes the environments and runs this.

Beside passing or failing, each test notes what it measured in figures-vllm.json of the stage's
folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from dlp_edge import Runtime
from dlp_edge.demo.demo import prompts
from dlp_edge.front.fusion_name import name_of, on_grid
from dlp_edge.front.generation import Generation
from dlp_edge.front.metrics import Metrics
from dlp_edge.front.pool import UpstreamPool
from dlp_edge.front.skills import RoutedSkills
from dlp_edge.front.upstream import Upstream
from dlp_edge.runtime.options import Adapters
from dlp_edge.types import RouteDecision
from tests.scale.demo_folders import BUNDLE, EXPORT
from tests.scale.vllm_server import VllmServer
from tests.testing.fronts import Fronted, fronted

PYTHON, FOLDER = os.environ.get("DLP_EDGE_VLLM_PYTHON"), os.environ.get("DLP_EDGE_SCALE_FOLDER")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PYTHON and FOLDER), reason="needs real vLLM servers: run .ci/vllm"),
]
TOKENS = 128
CLIENT_SECONDS = 600  # on a busy machine, the last of sixteen waits long
TWO_SKILLS = [
    "How much is 12 + 30? Then write an SQL query for the city of all users with age above 20.",
    "Write a short email to Ann: the meeting is at 10. And say it like a pirate: Where is my ship?",
    "Turn this into JSON: Paul Brown, 51, is a baker from Rome. Then: Could a cat drive a car?",
    "The train leaves at 8:10 and takes 25 minutes. When does it arrive? Then write an email to "
    "Max: I am late.",
    "Write an SQL query for the title of all films with rating below 5. Then mail Eva about it.",
    "Tom has 15 apples and buys 8. How many apples has Tom? Also turn this into JSON: Lisa Gray, "
    "22, is a pilot from Paris.",
    "Say it like a pirate: Good morning, my friend. Then: The show starts at 20:05 and takes 40 "
    "minutes. When is it over?",
    "Could a dog read a book? And write an SQL query for the name of all dogs with age above 3.",
    "Mail Kim that the office is closed on Friday.\nThen: Say it like a pirate: I need some water.",
    "Turn this into JSON: Ivan Novak, 40, is a cook from Prague.\nThen: Ella has 9 books. Ella "
    "gives 4 to Tim. How many books does Ella have now?",
    "The class starts at 9:50 and takes 45 minutes. When is it over? Also: Could a fish climb a "
    "tree?",
    "Write an SQL query for the price of all cars with year above 2010. And then: Turn this into "
    "JSON: Mia White, 29, is a doctor from Bern.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(str(FOLDER))


@pytest.fixture(scope="module")
def skills(folder: Path) -> RoutedSkills:
    return RoutedSkills.load(folder / EXPORT, 4096)


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[list[VllmServer]]:
    count = os.cpu_count() or 2
    halves = f"0-{count // 2 - 1}", f"{count // 2}-{count - 1}"
    found = [
        VllmServer(str(PYTHON), folder / EXPORT, folder / f"vllm-{number}.log", cores)
        for number, cores in enumerate(halves, 1)
    ]
    try:
        for server in found:
            server.start()
        for server in found:
            server.wait()
        yield found
    finally:
        for server in found:
            server.kill()


@pytest.fixture(scope="module")
def note(folder: Path) -> Callable[..., None]:
    """Keeps a test's figures."""
    path = folder / "figures-vllm.json"

    def keep(test: str, **figures: Any) -> None:
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, test: figures}, indent=1))
        print(f"\n{test}: {json.dumps(figures)}")

    return keep


@pytest.fixture(scope="module")
def references(folder: Path, skills: RoutedSkills) -> dict[str, Any]:
    """The fp32 bundle's answers under recompute, its weights on the front's grid."""

    def grid(decision: RouteDecision, generated: str) -> Adapters:
        return on_grid(decision.weights, skills.manifest.max_skills)

    options: Any = {"max_new_tokens": TOKENS, "kv": "recompute", "on_route": grid, "logprobs": 0}
    with Runtime(folder / BUNDLE) as runtime:
        return {prompt: runtime.generate(prompt, **options) for prompt in (*prompts(), *TWO_SKILLS)}


def ask(front: Fronted, prompt: str, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": prompt}]
    options: Any = {"max_tokens": TOKENS, "model": "auto", **more}
    own = {"dlp_edge": {"requests": "together"}}
    client = front.client(timeout=CLIENT_SECONDS)
    return client.chat.completions.create(messages=messages, extra_body=own, **options)


def urls(servers: list[VllmServer]) -> list[str]:
    return [server.url for server in servers]


async def tokens_of(skills: RoutedSkills, url: str, prompt: str) -> tuple[list[int], Any]:
    """The ids that a front's answer is made of, and its reply."""
    async with httpx2.AsyncClient(trust_env=False) as client:
        pool, metrics = UpstreamPool([Upstream(url, client, 60)], 5), Metrics()
        await pool.start()
        options = skills.parse({"max_new_tokens": TOKENS})
        answer: Any = skills.prepare([{"role": "user", "content": prompt}], options)
        generation = Generation(pool, metrics, options.decoding, prompt)
        async with aclosing(generation.stream(answer)) as chunks:
            async for _ in chunks:
                pass
        await pool.stop()
        return answer.tokens, answer.reply()


def test_answers_are_those_of_the_fp32_bundle_token_for_token(
    servers: list[VllmServer],
    skills: RoutedSkills,
    references: dict[str, Any],
    note: Callable[..., None],
) -> None:
    same, switches, first, switched = [], 0, [], []
    for prompt, reference in references.items():
        tokens, reply = asyncio.run(tokens_of(skills, servers[0].url, prompt))
        equal = tokens == [token.id for token in reference.tokens] and reply.text == reference.text
        same.append(equal)
        if not equal:
            print(f"\n{prompt!r}\n  {reference.text!r}\n  {reply.text!r}")
        switches += reply.timings.switches
        first.append(reply.timings.first_token)
        if reply.timings.switches:
            switched.append(reply.timings.recompute / reply.timings.switches)
    six = len(prompts())
    note(
        "parity",
        demo=f"{sum(same[:six])} of {six}",
        two_skills=f"{sum(same[six:])} of {len(same) - six}",
        switches=switches,
        median_first_token_ms=median_ms(first),
        median_switch_ms=median_ms(switched),
    )
    assert switches >= len(TWO_SKILLS)
    assert all(same)


def test_another_server_goes_on_when_one_is_killed_in_a_sentence(
    servers: list[VllmServer],
    skills: RoutedSkills,
    references: dict[str, Any],
    note: Callable[..., None],
) -> None:
    prompt = prompts()[3]
    with fronted(skills, urls(servers), silence=60, patience=30) as front:
        arrived: list[tuple[float, str]] = []
        killed_at = 0.0
        for piece in ask(front, prompt, stream=True):
            arrived.append((time.perf_counter(), piece.choices[0].delta.content or ""))
            if len(arrived) == 9:
                running = {s.url: s for s in servers}
                victim = next(upstream for upstream in upstreams_of(front) if upstream.running)
                running[victim.url].kill()
                killed_at = time.perf_counter()
        text = "".join(content for _, content in arrived)
        gap = next(at for at, _ in arrived[9:] if at > killed_at) - killed_at
        assert text == references[prompt].text
        dead = next(server for server in servers if server._process is None)
        rest = [ask(front, each).choices[0].message.content for each in prompts()]
        assert rest == [references[each].text for each in prompts()]

        dead.start()
        seconds = dead.wait()
        deadline = time.monotonic() + 10
        while not all(upstream.is_up for upstream in upstreams_of(front)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        answers = together(front, prompts())
        assert answers == [references[each].text for each in prompts()]
    note("failover", same_text=True, gap_ms=round(gap * 1e3), restart_s=round(seconds, 1))


def test_a_front_waits_for_its_only_server_or_says_503(
    servers: list[VllmServer],
    skills: RoutedSkills,
    references: dict[str, Any],
    note: Callable[..., None],
) -> None:
    prompt = prompts()[1]
    server = servers[1]
    with fronted(skills, [server.url], silence=60, patience=1) as front:
        assert ask(front, prompt).choices[0].message.content == references[prompt].text
        server.kill()
        began = time.perf_counter()
        refused: list[int] = []
        server.start()
        while True:
            try:
                text = ask(front, prompt).choices[0].message.content
                break
            except openai.InternalServerError as error:
                refused.append(error.status_code)
                time.sleep(1)
        assert set(refused) <= {502, 503}
        assert text == references[prompt].text
    note("restart", refused=len(refused), seconds=round(time.perf_counter() - began, 1))


def test_sixteen_conversations_at_once(
    servers: list[VllmServer],
    skills: RoutedSkills,
    references: dict[str, Any],
    note: Callable[..., None],
) -> None:
    asked = [*prompts(), *TWO_SKILLS][:16]
    with fronted(skills, urls(servers), silence=300) as front:
        began = time.perf_counter()
        answers = together(front, asked)
        seconds = time.perf_counter() - began
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        tokens = sum(len(references[each].tokens) for each in asked)
        same = sum(a == references[p].text for a, p in zip(answers, asked, strict=True))
        note(
            "sixteen",
            errors=len(errors),
            same_text=f"{same} of {len(asked)}",
            seconds=round(seconds, 1),
            tokens_a_second=round(tokens / seconds, 1),
            front_errors=len(front.errors),
        )
        assert errors == []
        assert front.errors == []
        assert same == len(asked)


def test_two_hundred_fusions_with_eviction(
    servers: list[VllmServer], skills: RoutedSkills, note: Callable[..., None]
) -> None:
    server = servers[0]
    prompt = skills.encoder.prompt_ids([{"role": "user", "content": "Hello there"}], 4096)
    names = fusions([adapter.name for adapter in skills.manifest.adapters], 200)
    statuses, new, memory = [], [], []
    for at, name in enumerate(names):
        status, seconds = server.complete(name, prompt)
        statuses.append(status)
        new.append(seconds)
        if at % 25 == 24:
            memory.append(round(server.resident_megabytes()))
    warm = [server.complete(name, prompt)[1] for name in names[-5:] for _ in range(4)]
    evicted = [server.complete(name, prompt) for name in names[:20]]
    note(
        "fusions",
        fusions=len(names),
        errors=sum(status != 200 for status in (*statuses, *(s for s, _ in evicted))),
        median_new_ms=median_ms(new),
        median_loaded_ms=median_ms(warm),
        median_evicted_ms=median_ms([seconds for _, seconds in evicted]),
        resident_mb_each_25=memory,
    )
    assert set(statuses) == {200}
    assert {status for status, _ in evicted} == {200}
    # 64 are kept in memory; beyond that, a fusion more must not cost memory.
    assert memory[-1] - memory[3] < 60
    for wrong in ("sql@0.4+email@0.6", "../sql", "sql@0.60+email@0.40/..", "nobody", "sql@1.00"):
        assert server.complete(wrong, prompt)[0] == 404


def fusions(skills: list[str], count: int) -> list[str]:
    """That many names of two skills, in a random order."""
    found = [
        name_of({a: k / 20, b: 1 - k / 20})
        for at, a in enumerate(skills)
        for b in skills[at + 1 :]
        for k in range(1, 20)
    ]
    random.Random(0).shuffle(found)
    return found[:count]


def upstreams_of(front: Fronted) -> Any:
    return front.server.pool.upstreams


def together(front: Fronted, asked: list[str]) -> list[Any]:
    """Answers to all at once: texts, or what was raised."""
    answers: list[Any] = [None] * len(asked)

    def one(at: int) -> None:
        try:
            answers[at] = ask(front, asked[at]).choices[0].message.content
        except Exception as error:
            answers[at] = error

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def median_ms(seconds: list[float]) -> float:
    return round(sorted(seconds)[len(seconds) // 2] * 1e3, 1)
