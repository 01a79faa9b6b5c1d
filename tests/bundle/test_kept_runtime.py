"""A bundle of an earlier release in whole use: the runtime, its changes, the CLI, the server."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlp_edge import Runtime, UsageError
from dlp_edge.cli.main import main
from tests.testing.paths import KEPT
from tests.testing.serving import HELLO, serving

PROMPT = "Count 3 and 4"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime(KEPT, threads=1) as runtime:
        yield runtime


def test_a_stream_is_its_reply(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, max_new_tokens=20)
    assert "".join(chunk.text for chunk in stream) == stream.reply.text
    assert stream.reply.text == runtime.generate(PROMPT, max_new_tokens=20).text


def test_async(runtime: Runtime) -> None:
    async def talk() -> str:
        return "".join([chunk.text async for chunk in runtime.astream(PROMPT, max_new_tokens=20)])

    assert asyncio.run(talk()) == runtime.generate(PROMPT, max_new_tokens=20).text


def test_a_batch_answers_as_one_by_one(runtime: Runtime) -> None:
    prompts = [PROMPT, "Greet Ann", "Count the days and greet Bob"]
    alone = [runtime.generate(prompt, max_new_tokens=20).text for prompt in prompts]
    for kv in ("keep", "recompute"):
        batch = runtime.generate_batch(prompts, max_batch=2, max_new_tokens=20, kv=kv)  # type: ignore[arg-type]
        if kv == "keep":
            assert [reply.text for reply in batch] == alone


def test_a_session_remembers_and_branches(runtime: Runtime, tmp_path: Path) -> None:
    session = runtime.session()
    session.send(PROMPT, max_new_tokens=8)
    twin = session.branch()
    twin.send("Greet Ann", max_new_tokens=8)
    assert [message["role"] for message in twin.messages] == ["user", "assistant"] * 2
    twin.save(tmp_path / "chat.json")
    assert runtime.load_session(tmp_path / "chat.json").messages == twin.messages
    assert len(session.messages) == 2


def test_sampling_repeats_with_its_seed(runtime: Runtime) -> None:
    texts = {
        runtime.generate(PROMPT, temperature=1.5, seed=7, max_new_tokens=20).text for _ in range(3)
    }
    assert len(texts) == 1


def test_pinned_forbidden_and_base(runtime: Runtime) -> None:
    pinned = runtime.generate(PROMPT, adapters={"count": 0.5}, max_new_tokens=4)
    assert pinned.sentences[0].fusion == {"count": 0.5}
    assert runtime.generate(PROMPT, adapters={}, max_new_tokens=4).sentences[0].fusion == {}
    assert "count" not in runtime.route(PROMPT, forbid=["count"], min_confidence=0.0).weights
    with pytest.raises(UsageError, match="no adapter"):
        runtime.generate(PROMPT, adapters="chess")


def test_removing_an_adapter_survives_a_reload(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(KEPT, tmp_path / "copy"))
    with Runtime(copy, threads=1) as runtime:
        runtime.remove_adapter("greet")
        assert [adapter.name for adapter in runtime.adapters] == ["count"]
    with Runtime(copy, threads=1) as runtime:
        assert [adapter.name for adapter in runtime.adapters] == ["count"]
        runtime.generate(PROMPT, max_new_tokens=4)


@pytest.mark.parametrize(
    "verb",
    [
        ["inspect", str(KEPT)],
        ["verify", str(KEPT)],
        ["route", str(KEPT), PROMPT],
        ["run", str(KEPT), PROMPT, "--max-new-tokens", "4"],
    ],
    ids=lambda words: words[0],
)
def test_verbs_print_one_json_document(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--json", "--quiet"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_the_server_answers_openais_client(runtime: Runtime) -> None:
    with serving(runtime) as served:
        answer = served.client().chat.completions.create(model="auto", messages=HELLO, max_tokens=4)
    assert answer.choices[0].message.content is not None
    assert answer.choices[0].finish_reason in ("stop", "length")
