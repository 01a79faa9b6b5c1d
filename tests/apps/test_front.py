"""`dlp-edge front` over fake vLLM servers, whose completions come from the bundle's own engine."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from dlp_edge import Runtime
from dlp_edge.front.answering import conversation_of
from dlp_edge.front.skills import RoutedSkills
from dlp_edge.runtime.decoding.request_answers import SEPARATOR
from tests.engine.test_requests import BarSplitter
from tests.testing.fake_vllm import FakeVllm, Fault, fake_vllms
from tests.testing.fronts import FickleRouter, Fronted, fronted, grid, make_router_folder
from tests.testing.serving import soon

TOKENS = 120
# The tiny bundle's answers are noise; these have several sentences, under several fusions.
PROMPTS = ["Question 12", "Question 4", "Question 17", "Kind regards"]
GREEDY: Any = {"max_new_tokens": TOKENS, "kv": "recompute", "on_route": grid}


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle) as runtime:
        assert runtime._loaded is not None
        router: Any = FickleRouter()
        runtime._loaded = replace(runtime._loaded, router=router)
        yield runtime


@pytest.fixture(scope="module")
def skills(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> RoutedSkills:
    folder = make_router_folder(tiny_bundle, tmp_path_factory.mktemp("front") / "export")
    router: Any = FickleRouter()
    return replace(RoutedSkills.load(folder, 4096), router=router)


@pytest.fixture
def fakes(runtime: Runtime) -> Iterator[list[FakeVllm]]:
    with fake_vllms(runtime, 2) as fakes:
        yield fakes


@pytest.fixture
def front(skills: RoutedSkills, fakes: list[FakeVllm]) -> Iterator[Fronted]:
    with fronted(skills, [fake.url for fake in fakes]) as front:
        yield front


def ask(front: Fronted, prompt: str, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": prompt}]
    options: Any = {"max_tokens": TOKENS, "model": "auto", **more}
    return front.client().chat.completions.create(messages=messages, **options)


def sentences(answer: Any) -> list[tuple[str, dict[str, float]]]:
    return [(s["text"], s["fusion"]) for s in answer.model_extra["dlp_edge"]["sentences"]]


def expected(runtime: Runtime, prompt: str, **more: Any) -> Any:
    return runtime.generate(prompt, **{**GREEDY, **more})


def asked(fakes: list[FakeVllm]) -> list[Any]:
    return [completion for fake in fakes for completion in fake.completions]


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_answer_is_that_of_a_runtime_that_recomputes(
    front: Fronted, fakes: list[FakeVllm], runtime: Runtime, at_once: int
) -> None:
    for fake in fakes:
        fake.at_once = at_once
    switches = 0
    for prompt in PROMPTS:
        reply, answer = expected(runtime, prompt), ask(front, prompt)
        assert answer.choices[0].message.content == reply.text
        assert answer.choices[0].finish_reason == reply.finish_reason
        assert answer.usage.completion_tokens == reply.usage.completion_tokens
        assert answer.usage.prompt_tokens == reply.usage.prompt_tokens
        assert sentences(answer) == [(s.text, s.fusion) for s in reply.sentences]
        switches += reply.timings.switches
    assert switches > 5  # or the test shows nothing
    assert len(asked(fakes)) == len(PROMPTS) + switches
    assert front.errors == []


def test_a_switch_drops_the_stream_and_goes_on_from_the_tokens(
    front: Fronted, fakes: list[FakeVllm], runtime: Runtime
) -> None:
    for fake in fakes:
        fake.pace = 0.005
    ask(front, PROMPTS[0])
    first, second, *_ = asked(fakes)
    assert first.fusion != second.fusion
    written = len(second.body["prompt"]) - len(first.body["prompt"])
    assert written > 0
    assert second.body["max_tokens"] == TOKENS - written
    assert second.body["prompt"][: len(first.body["prompt"])] == first.body["prompt"]
    assert first.done.wait(5)
    assert first.aborted


def test_a_stream_has_a_fusion_in_each_chunk(
    front: Fronted, fakes: list[FakeVllm], runtime: Runtime
) -> None:
    reply = expected(runtime, PROMPTS[0])
    *pieces, last, usage = ask(
        front, PROMPTS[0], stream=True, stream_options={"include_usage": True}
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == reply.text
    for piece in pieces[1:]:
        own = piece.model_extra["dlp_edge"]
        assert own["fusion"] == reply.sentences[own["sentence"]].fusion
    assert sentences(last) == [(s.text, s.fusion) for s in reply.sentences]
    assert usage.usage.completion_tokens == reply.usage.completion_tokens
    timings = last.model_extra["dlp_edge"]["timings"]
    assert timings["switches"] == reply.timings.switches
    assert timings["prefill"] > 0


@pytest.mark.parametrize("fault", ["break", "error", "status", "silence"])
def test_another_server_goes_on_in_the_middle_of_a_sentence(
    skills: RoutedSkills, runtime: Runtime, fakes: list[FakeVllm], fault: str
) -> None:
    reply = expected(runtime, PROMPTS[0])
    for fake in fakes:  # whichever is asked first
        fake.faults.append(Fault(fault, after=7))
    with fronted(skills, [fake.url for fake in fakes], silence=0.3) as front:
        answer = ask(front, PROMPTS[0])
        assert answer.choices[0].message.content == reply.text
        assert {len(fake.completions) > 0 for fake in fakes} == {True}
        assert "failovers_total 2" in metrics(front)
        assert front.errors == []


def test_after_a_loss_the_answer_stays_with_the_server_that_took_it_up(
    front: Fronted, fakes: list[FakeVllm], runtime: Runtime
) -> None:
    first = ask(front, PROMPTS[0])  # which has switches
    own = max(fakes, key=lambda fake: len(fake.completions))
    (other,) = (fake for fake in fakes if fake is not own)
    own.completions.clear()
    own.faults.append(Fault("break", after=3))
    again = ask(front, PROMPTS[0])
    assert again.choices[0].message.content == first.choices[0].message.content
    assert len(own.completions) == 1
    assert len(other.completions) == 1 + expected(runtime, PROMPTS[0]).timings.switches


def test_a_dead_server_is_left_out_and_a_restarted_one_is_used(
    skills: RoutedSkills, runtime: Runtime, fakes: list[FakeVllm]
) -> None:
    with fronted(skills, [fake.url for fake in fakes]) as front:
        fakes[0].stop()
        for prompt in PROMPTS:
            content = ask(front, prompt).choices[0].message.content
            assert content == expected(runtime, prompt).text
        assert f'upstream_up{{upstream="{fakes[0].url}"}} 0' in metrics(front)
        before = len(fakes[0].completions)
        fakes[1].is_well = False
        assert soon(lambda: health(front)[0] == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            ask(front, PROMPTS[0])
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "5"
        fakes[1].is_well = True
        assert soon(lambda: health(front)[0] == 200)
        assert ask(front, PROMPTS[1]).choices[0].finish_reason
        assert len(fakes[0].completions) == before


def test_a_request_that_fells_servers_is_given_up(front: Fronted, fakes: list[FakeVllm]) -> None:
    for fake in fakes:
        fake.faults += [Fault("break", after=2)] * 5
    with pytest.raises(openai.InternalServerError) as refused:
        ask(front, PROMPTS[0])
    assert refused.value.status_code == 502
    assert len(asked(fakes)) == 3
    assert [type(error).__name__ for error in front.errors] == ["UpstreamLostError"]


def test_an_error_within_a_stream_is_an_event(front: Fronted, fakes: list[FakeVllm]) -> None:
    for fake in fakes:
        fake.faults += [Fault("break", after=2)] * 5
    with pytest.raises(openai.APIError, match="servers behind"):
        list(ask(front, PROMPTS[0], stream=True))


def test_a_server_without_the_plugin_is_a_clear_error(
    front: Fronted, fakes: list[FakeVllm]
) -> None:
    for fake in fakes:
        fake.faults += [Fault("status", status=404)] * 2
    with pytest.raises(openai.InternalServerError) as refused:
        ask(front, PROMPTS[0])
    assert refused.value.status_code == 502
    assert len(asked(fakes)) == 1  # no other server is asked
    assert "plugin" in str(front.errors[0])


def test_a_client_that_leaves_ends_the_completion(front: Fronted, fakes: list[FakeVllm]) -> None:
    for fake in fakes:
        fake.pace = 0.02
    stream = ask(front, PROMPTS[0], stream=True)
    for _, _ in zip(range(4), stream, strict=False):
        pass
    stream.close()
    assert soon(lambda: all(completion.done.is_set() for completion in asked(fakes)))
    assert any(completion.aborted for completion in asked(fakes))
    assert soon(lambda: "dlp_edge_front_running 0" in metrics(front))
    assert 'requests_total{status="499"} 1' in metrics(front)


def test_a_conversation_stays_with_its_server(
    skills: RoutedSkills, fakes: list[FakeVllm], front: Fronted
) -> None:
    turns: list[Any] = [{"role": "user", "content": PROMPTS[3]}]
    client = front.client()
    for _ in range(3):
        answer = client.chat.completions.create(model="sql", messages=turns, max_tokens=5)
        said = answer.choices[0].message.content
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
    assert sorted(len(fake.completions) for fake in fakes) == [0, 3]
    assert conversation_of(turns) == conversation_of(turns[:1])
    assert conversation_of(turns) != conversation_of([{"role": "user", "content": "Hi"}])


def test_load_is_spread_although_conversations_stay(front: Fronted, fakes: list[FakeVllm]) -> None:
    for fake in fakes:
        fake.pace = 0.02
    headers = {"X-Conversation-Id": "the same for all"}
    run_all(12, lambda i: ask(front, PROMPTS[i % 4], model="sql", extra_headers=headers))
    assert min(len(fake.completions) for fake in fakes) >= 3


def test_the_queue_is_bounded(skills: RoutedSkills, fakes: list[FakeVllm]) -> None:
    for fake in fakes:
        fake.pace = 0.02
    with fronted(skills, [fake.url for fake in fakes], running=2, waiting=1) as front:
        statuses: list[str] = []

        def one(i: int) -> None:
            try:
                ask(front, PROMPTS[0])
                statuses.append("ok")
            except openai.RateLimitError as error:
                statuses.append(error.response.headers["retry-after"])

        run_all(6, one)
        assert sorted(statuses) == ["1"] * 3 + ["ok"] * 3
        assert 'requests_total{status="429"} 3' in metrics(front)


def test_requests_of_one_prompt_run_in_parallel(
    skills: RoutedSkills, runtime: Runtime, fakes: list[FakeVllm]
) -> None:
    splitter: Any = BarSplitter()
    parts = PROMPTS[:3]
    for fake in fakes:
        fake.pace = 0.01
    with fronted(replace(skills, splitter=splitter), [fake.url for fake in fakes]) as front:
        answer = ask(front, " | ".join(parts))
        each = [expected(runtime, part).text for part in parts]
        assert answer.choices[0].message.content == SEPARATOR.join(each)
        requests = answer.model_extra["dlp_edge"]["requests"]
        assert [request["answer"] for request in requests] == each
        started = [c for c in asked(fakes) if c.body["max_tokens"] == TOKENS]
        assert len(started) == 3
        first_switch = next(c for c in asked(fakes) if c.body["max_tokens"] != TOKENS)
        assert max(map(started_at, started)) < started_at(first_switch)


def test_a_request_that_leans_follows_the_answer_before(
    skills: RoutedSkills, runtime: Runtime, fakes: list[FakeVllm], front: Fronted
) -> None:
    splitter: Any = BarSplitter()
    with fronted(replace(skills, splitter=splitter), [fake.url for fake in fakes]) as front:
        answer = ask(front, f"{PROMPTS[0]} | that again", max_tokens=12)
        first, second = answer.model_extra["dlp_edge"]["requests"]
        turns = [
            {"role": "user", "content": PROMPTS[0]},
            {"role": "assistant", "content": first["answer"]},
            {"role": "user", "content": "that again"},
        ]
        reply = runtime.generate(turns, **{**GREEDY, "max_new_tokens": 12})
        assert second["answer"] == reply.text


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"extra_body": {"dlp_edge": {"kv": "keep"}}}, "dlp_edge"),
        ({"extra_body": {"dlp_edge": {"speculate": True}}}, "dlp_edge"),
    ],
)
def test_what_does_not_go_on_across_a_switch_is_refused(
    front: Fronted, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(front, PROMPTS[0], **more)
    assert refused.value.param == param


@pytest.mark.parametrize("weights", [{"sql": -1.0}, {"sql": 3.0}, {"nobody": 1.0}])
def test_pinned_weights_have_bounds(front: Fronted, weights: dict[str, float]) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(front, PROMPTS[0], extra_body={"dlp_edge": {"adapters": weights}})


def test_pinned_weights_are_rounded_to_the_grid(
    front: Fronted, fakes: list[FakeVllm], runtime: Runtime
) -> None:
    for model, adapters, name in [
        ("base", {}, "base"),
        ("sql", {"sql": 1.0}, "sql"),
        ("auto", {"sql": 0.31, "email": 0.69}, "email@0.70+sql@0.30"),
    ]:
        own = {"adapters": adapters} if model == "auto" else {}
        answer = ask(front, PROMPTS[0], model=model, extra_body={"dlp_edge": own})
        pinned = {"sql": 0.3, "email": 0.7} if model == "auto" else adapters
        reply = runtime.generate(PROMPTS[0], adapters=pinned, max_new_tokens=TOKENS)
        assert answer.choices[0].message.content == reply.text
        assert {completion.fusion for completion in asked(fakes)} == {name}
        for fake in fakes:
            fake.completions.clear()


def test_a_seed_counts_on_across_switches(
    front: Fronted, fakes: list[FakeVllm], runtime: Runtime
) -> None:
    ask(front, PROMPTS[0], temperature=0.7, seed=100)
    first, second, *_ = asked(fakes)
    assert first.body["seed"] == 100
    written = len(second.body["prompt"]) - len(first.body["prompt"])
    assert second.body["seed"] == 100 + written
    assert second.body["temperature"] == 0.7


def test_stop_strings_end_the_answer_and_the_completion(
    front: Fronted, fakes: list[FakeVllm], runtime: Runtime
) -> None:
    text = expected(runtime, PROMPTS[0]).text
    stop = text[9:12]
    answer = ask(front, PROMPTS[0], stop=stop)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_none_of_vllms_own_endpoints_is_served(front: Fronted) -> None:
    for path in ("load_lora_adapter", "unload_lora_adapter", "completions", "embeddings"):
        request = urllib.request.Request(f"{front.url}/{path}", b"{}", method="POST")
        request.add_header("Content-Type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 404


def test_a_key_is_asked_for(skills: RoutedSkills, fakes: list[FakeVllm]) -> None:
    with fronted(skills, [fake.url for fake in fakes], key="secret") as front:
        with pytest.raises(openai.AuthenticationError):
            ask(front, PROMPTS[0])
        names = [model.id for model in front.client("secret").models.list()]
        assert names == ["auto", "base", "sums", "sql", "email"]


def metrics(front: Fronted) -> str:
    with urllib.request.urlopen(front.url.removesuffix("v1") + "metrics", timeout=10) as response:
        return str(response.read().decode())


def health(front: Fronted) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(
            front.url.removesuffix("v1") + "health", timeout=10
        ) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def run_all(count: int, work: Any) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def started_at(completion: Any) -> float:
    return float(completion.started)
