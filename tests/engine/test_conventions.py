"""Python's conventions: logging, a tokenizer to ask, seeds that are told, bars for progress."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import BusyError, Runtime, UsageError
from dlp_edge.progress import to_rich, to_tqdm

SAMPLED: Any = {"adapters": {}, "temperature": 1.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle, max_context=128) as loaded:
        yield loaded


def test_the_logger_tells_what_happens(
    bundle_copy: Path, parrot: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "dlp_edge"), Runtime(bundle_copy) as runtime:
        runtime.generate("Hello", adapters="sums", max_new_tokens=3)
        runtime.add_adapter("parrot", parrot)
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == ["INFO", "DEBUG", "DEBUG", "INFO"]
    loaded, routed, answered, written = (text for _, text in told)
    assert loaded.startswith(f"loaded {bundle_copy} on cpu in ")
    assert routed == "from character 0: {'sums': 1.0}"
    assert answered == "answered: 3 tokens, length"
    assert written == f"wrote edition 1 of {bundle_copy}"


def test_the_logger_is_silent_by_default(bundle_copy: Path) -> None:
    code = (
        "import logging, sys\n"
        "from dlp_edge import Runtime\n"
        "logging.getLogger('dlp_edge.any').error('not shown')\n"
        "with Runtime(sys.argv[1]) as rt: rt.remove_adapter('sql')\n"
    )
    command = [sys.executable, "-c", code, str(bundle_copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_verbose_command_logs(tiny_bundle: Path) -> None:
    command = ["run", str(tiny_bundle), "Hello", "--max-new-tokens", "3", "--quiet"]
    for verbose in ([], ["--verbose"]):
        done = subprocess.run(
            [sys.executable, "-m", "dlp_edge.cli.main", *command, *verbose],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("dlp_edge.runtime.runtime: loaded" in done.stderr) == bool(verbose)


def test_the_tokenizer_tells_what_a_prompt_costs(runtime: Runtime) -> None:
    tokenizer = runtime.tokenizer
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    for prompt in ("Hello", messages, "x<|end|>y"):
        usage = runtime.generate(prompt, adapters={}, max_new_tokens=1).usage
        assert tokenizer.count(prompt) == usage.prompt_tokens
    for text in ("", "H\u00e9llo \u4f60 \U0001f600", "x<|end|>y"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert runtime.count_tokens(text) == len(tokenizer.encode(text))
    assert tokenizer.decode([256, 257]) == ""
    assert tokenizer.decode([256, 257], control=True) == "<|end|><|user|>"


def test_the_room_is_what_an_answer_can_have(runtime: Runtime) -> None:
    prompt = "x" * 100
    room = runtime.tokenizer.room(prompt)
    options: Any = {"adapters": {}, "temperature": 2.0, "seed": 4, "repetition_stop": False}
    reply = runtime.generate(prompt, max_new_tokens=999, **options)
    assert 0 < room < 30
    assert reply.finish_reason == "length"
    assert reply.usage.completion_tokens == room
    assert runtime.tokenizer.room("x" * 500) == 0


@pytest.mark.parametrize("ids", [[-1], [10**6], ["a"], [1.5], [True]])
def test_ids_that_are_none(runtime: Runtime, ids: Any) -> None:
    with pytest.raises(UsageError, match="an id is"):
        runtime.tokenizer.decode(ids)


def test_a_reply_names_its_seed(runtime: Runtime) -> None:
    reply = runtime.generate("Hello", **SAMPLED)
    assert reply.seed is not None
    assert runtime.generate("Hello", seed=reply.seed, **SAMPLED).text == reply.text
    other = runtime.generate("Hello", **SAMPLED)
    assert (other.seed, other.text) != (reply.seed, reply.text)
    assert runtime.generate("Hello", seed=7, **SAMPLED).seed == 7
    assert runtime.generate("Hello", adapters={}, max_new_tokens=2).seed is None
    batch = runtime.generate_batch(["Hello", "Hello"], **SAMPLED)
    assert batch[0].seed != batch[1].seed


def test_a_conversation_undoes_a_turn(runtime: Runtime) -> None:
    chat = runtime.session(system="Be brief.")
    first = chat.send("One.", adapters={}, max_new_tokens=4)
    before = chat.messages
    second = chat.send("Two.", adapters={}, max_new_tokens=4)
    assert [message["content"] for message in chat.undo()] == ["Two.", second.text]
    assert chat.messages == before
    assert chat.send("Two.", adapters={}, max_new_tokens=4).text == second.text
    chat.undo()
    chat.undo()
    assert chat.messages == ({"role": "system", "content": "Be brief."},)
    with pytest.raises(UsageError, match="empty"):
        chat.undo()
    assert chat.send("One.", adapters={}, max_new_tokens=4).text == first.text


def test_a_conversation_takes_a_message_in(runtime: Runtime) -> None:
    chat = runtime.session()
    chat.insert({"role": "user", "content": "Who is it?"})
    chat.insert({"role": "assistant", "content": "Leo."})
    chat.insert({"role": "system", "content": "Be brief."}, at=0)
    said = [*chat.messages, {"role": "user", "content": "Who?"}]
    assert [message["role"] for message in said] == ["system", "user", "assistant", "user"]
    expected = runtime.generate(said, adapters={}, max_new_tokens=6).text
    assert chat.send("Who?", adapters={}, max_new_tokens=6).text == expected
    wrong: Any = {"role": "robot", "content": "x"}
    with pytest.raises(UsageError, match="unknown role"):
        chat.insert(wrong)
    with pytest.raises(UsageError, match="at is"):
        chat.insert(said[0], at=1.5)  # type: ignore[arg-type]


def test_a_running_turn_cannot_be_undone(runtime: Runtime) -> None:
    chat = runtime.session()
    with chat.stream("One.", adapters={}, max_new_tokens=40) as stream:
        next(stream)
        for change in (chat.undo, lambda: chat.insert({"role": "user", "content": "x"})):
            with pytest.raises(BusyError, match="unfinished"):
                change()
    chat.undo()


def test_progress_on_a_bar_of_tqdm(tiny_bundle: Path) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    for total in (None, 10, 100):
        with tqdm(total=total, file=io.StringIO()) as bar:
            Runtime(tiny_bundle, on_progress=to_tqdm(bar)).close()
            assert bar.n == bar.total == (total or 100)
            assert bar.postfix == "ready"


def test_progress_on_a_bar_of_rich(tiny_bundle: Path) -> None:
    rich = pytest.importorskip("rich.progress")
    console = pytest.importorskip("rich.console").Console(file=io.StringIO())
    with rich.Progress(console=console) as progress:
        task = progress.add_task("bundle", total=10)
        Runtime(tiny_bundle, on_progress=to_rich(progress, task)).close()
        assert progress.tasks[0].finished
        assert progress.tasks[0].description == "ready"
