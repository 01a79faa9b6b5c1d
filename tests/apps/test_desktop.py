"""The desktop example, driven by its widgets without a screen."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_edge import Reply, Runtime
from dlp_edge.runtime.engine.decoder import Decoder
from tests.testing.paths import ROOT

EXAMPLE = ROOT / "examples" / "desktop"
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

# An ImportError, not only a missing module: Qt needs libraries of the system (libEGL).
pytest.importorskip("PySide6.QtWidgets", reason="needs PySide6", exc_type=ImportError)

import tint  # noqa: E402 - these need what is set above
from PySide6.QtCore import QCoreApplication, QEventLoop, QTimer  # noqa: E402
from PySide6.QtGui import QColor  # noqa: E402
from PySide6.QtWidgets import QApplication, QFileDialog  # noqa: E402
from window import ChatWindow  # noqa: E402

QUESTION = "Select the city of row 12"


@pytest.fixture(scope="module")
def app() -> QApplication:
    found = QApplication.instance()
    return found if isinstance(found, QApplication) else QApplication([])


@pytest.fixture
def window(app: QApplication) -> Iterator[ChatWindow]:
    window = ChatWindow()
    window.show()
    yield window
    window.close()


@pytest.fixture
def chat(window: ChatWindow, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> ChatWindow:
    """A window with the tiny bundle, whose context holds several such answers."""
    monkeypatch.setattr("window.MAX_NEW_TOKENS", 100)
    window.open_bundle(tiny_bundle)
    wait_for(lambda: window.state == "ready")
    return window


def wait_for(happened: Callable[[], bool], seconds: float = 30) -> None:
    """Lets the windows live until something has happened."""
    waker = QTimer(interval=5)
    waker.start()
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        QCoreApplication.processEvents(QEventLoop.ProcessEventsFlag.WaitForMoreEvents)


def begin(chat: ChatWindow, text: str) -> None:
    chat.prompt.setText(text)
    chat.send.click()
    assert chat.state == "answering"


def answer_to(chat: ChatWindow, act: Callable[[], None]) -> Reply:
    """The answer to what an act asks for, whole."""
    replies: list[Reply] = []
    chat.assistant.answered.connect(lambda reply, dropped: replies.append(reply))
    act()
    # Each listener to a signal is told on its own: the window may be ready before this list.
    wait_for(lambda: chat.state == "ready" and (bool(replies) or chat.error.isVisible()))
    assert replies, chat.error.text()
    return replies[0]


def ask(chat: ChatWindow, text: str) -> Reply:
    return answer_to(chat, lambda: begin(chat, text))


def shown(chat: ChatWindow) -> str:
    return chat.transcript.toPlainText()


def backgrounds(chat: ChatWindow, text: str) -> set[str]:
    """The colours under a text in the transcript."""
    cursor = chat.transcript.document().find(text)
    assert not cursor.isNull(), f"{text!r} is not shown"
    end, found = cursor.selectionEnd(), set()
    for position in range(cursor.selectionStart() + 1, end + 1):
        cursor.setPosition(position)
        found.add(cursor.charFormat().background().color().name(QColor.NameFormat.HexArgb))
    return found


def test_loading_is_shown(window: ChatWindow, tiny_bundle: Path) -> None:
    seen: list[tuple[str, float]] = []
    window.assistant.loading.connect(
        lambda stage, fraction: seen.append((window.status.text(), window.progress.value() / 1000))
    )
    assert not window.send.isEnabled()
    window.open_bundle(tiny_bundle)
    assert window.progress.isVisible()
    wait_for(lambda: window.state == "ready")
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert any("backbone" in status for status, _ in seen)
    assert not window.progress.isVisible()
    assert list(window.legend.buttons) == ["sums", "sql", "email"]


def test_the_answer_is_the_runtimes_with_its_sentences_tinted(
    chat: ChatWindow, tiny_bundle: Path
) -> None:
    reply = ask(chat, QUESTION)
    with Runtime(tiny_bundle) as runtime:
        expected = runtime.generate(QUESTION, max_new_tokens=100)
    assert reply.text == expected.text
    lines = expected.text.rstrip().replace("\r", "\n").splitlines()
    assert QUESTION in shown(chat)
    assert all(line.strip() in shown(chat) for line in lines)
    assert backgrounds(chat, QUESTION) == {"#ff000000"}  # no colour
    names = list(chat.legend.buttons)
    for sentence in reply.sentences:
        words = max(sentence.text.split(), key=len, default="")
        if len(words) > 8 and shown(chat).count(words) == 1:
            colour = tint.blend(names, sentence.fusion).name(QColor.NameFormat.HexArgb)
            assert backgrounds(chat, words) == {colour}
    assert f"{reply.usage.completion_tokens} tokens" in chat.status.text()
    assert "tokens/s · first token after" in chat.status.text()


def test_pinning_and_forbidding(chat: ChatWindow) -> None:
    sql = chat.legend.buttons["sql"]
    assert ask(chat, QUESTION).sentences[0].fusion.keys() == {"sql"}
    sql.click()
    assert "pinned" in sql.text()
    pinned = ask(chat, "Write an email to Ann")
    assert all(sentence.confidence is None for sentence in pinned.sentences)
    assert pinned.sentences[0].fusion == {"sql": 1.0}
    sql.click()
    assert sql.font().strikeOut()
    forbidden = ask(chat, QUESTION)
    assert all("sql" not in sentence.fusion for sentence in forbidden.sentences)
    sql.click()
    assert chat.legend.options() == {"forbid": []}


def test_stopping_keeps_what_was_written(chat: ChatWindow) -> None:
    written: list[str] = []
    chat.assistant.wrote.connect(lambda chunks, reply: written.append(reply.text))
    begin(chat, QUESTION)
    assert not chat.again.isEnabled()
    wait_for(lambda: bool(written))
    chat.stop.click()
    stopped = time.monotonic()
    wait_for(lambda: chat.state == "ready")
    assert time.monotonic() - stopped < 1
    assert chat.assistant._chat is not None
    assert chat.assistant._chat.messages[-1]["content"] == written[-1]
    assert ask(chat, "And then?").text


def test_a_question_stopped_before_its_answer_can_be_asked_again(chat: ChatWindow) -> None:
    assert chat.assistant._runtime is not None
    with chat.assistant._runtime.stream("x", adapters={}) as other:
        next(other)  # the answer has to wait for this one
        begin(chat, QUESTION)
        chat.stop.click()
        wait_for(lambda: chat.state == "ready")
    assert chat.prompt.text() == QUESTION
    assert shown(chat) == ""
    assert not chat.again.isEnabled()


def test_answering_again_replaces_the_answer(chat: ChatWindow) -> None:
    ask(chat, "One.")
    first = ask(chat, QUESTION)
    before = shown(chat)
    second = answer_to(chat, chat.again.trigger)
    assert second.text != first.text  # it is sampled
    assert shown(chat).startswith(before[: before.index(QUESTION) + len(QUESTION)])
    assert shown(chat).count(QUESTION) == 1
    assert first.text.strip()[:40].splitlines()[0] not in shown(chat)
    assert chat.assistant._chat is not None
    assert len(chat.assistant._chat.messages) == 4


def test_a_new_chat_forgets(chat: ChatWindow) -> None:
    first = ask(chat, QUESTION)
    chat.new_chat.trigger()
    assert shown(chat) == ""
    assert ask(chat, QUESTION).usage.prompt_tokens == first.usage.prompt_tokens


def test_errors_show_cause_and_remedy(
    window: ChatWindow, tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window.open_bundle(tmp_path / "nothing")
    wait_for(lambda: window.state == "empty")
    assert "there is no bundle" in window.error.text()
    assert "Check the path" in window.error.text()
    assert window.error.isVisible()
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_: str(tiny_bundle))
    window.open.trigger()
    wait_for(lambda: window.state == "ready")
    assert not window.error.isVisible()


def test_a_refused_question_comes_back_and_leaves_the_conversation_alone(
    chat: ChatWindow,
) -> None:
    first = ask(chat, "One.")
    before = shown(chat)
    begin(chat, "x" * 600)
    wait_for(lambda: chat.state == "ready")
    assert "tokens" in chat.error.text()
    assert chat.prompt.text() == "x" * 600
    assert shown(chat) == before
    answer_to(chat, chat.again.trigger)
    assert not chat.error.isVisible()
    assert shown(chat).count("One.") == 1
    assert first.text.strip()[:40].splitlines()[0] not in shown(chat)


def test_opening_another_bundle_ends_the_answer(chat: ChatWindow, tiny_bundle: Path) -> None:
    begin(chat, QUESTION)
    chat.open_bundle(tiny_bundle)
    wait_for(lambda: chat.state == "ready")
    assert shown(chat) == ""
    assert ask(chat, QUESTION).text


def test_a_second_bundle_is_loaded_instead_of_the_first(
    window: ChatWindow, tmp_path: Path, tiny_bundle: Path
) -> None:
    window.open_bundle(tiny_bundle)
    window.open_bundle(tmp_path / "nothing")
    wait_for(lambda: window.state == "empty")
    assert "nothing" in window.error.text()
    window.open_bundle(tmp_path / "nothing")
    window.open_bundle(tiny_bundle)
    wait_for(lambda: window.state == "ready")
    assert ask(window, QUESTION).text


@pytest.mark.parametrize("moment", ["loading", "answering"])
def test_closing_the_window_ends_everything(
    window: ChatWindow, tiny_bundle: Path, moment: str
) -> None:
    window.open_bundle(tiny_bundle)
    if moment == "answering":
        wait_for(lambda: window.state == "ready")
        begin(window, QUESTION)
        wait_for(lambda: QUESTION in shown(window))
    begun = time.monotonic()
    window.close()
    assert time.monotonic() - begun < 2
    assert window.assistant._runtime is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("assistant")]


@pytest.mark.slow
def test_generation_does_not_block_the_window(
    chat: ChatWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Decoder.step

    def slow_step(*args: Any) -> Any:
        time.sleep(0.01)
        return step(*args)

    monkeypatch.setattr(Decoder, "step", slow_step)
    ticks = [time.perf_counter()]
    timer = QTimer(interval=1)
    timer.timeout.connect(lambda: ticks.append(time.perf_counter()))
    timer.start()
    reply = ask(chat, QUESTION)
    timer.stop()
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    assert reply.usage.completion_tokens > 20
    # benchmarks/window_gaps.py measures; here only that the answer is not waited for in the
    # window's thread, whose timer would tick once or twice.
    assert len(gaps) > 5


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 6), st.floats(0.01, 1), max_size=7))
def test_text_is_readable_on_every_blend(weights: dict[int, float]) -> None:
    names = [f"skill {i}" for i in range(7)]
    background = tint.blend(names, {names[i]: weight for i, weight in weights.items()})
    for text, paper in (("#000000", "#ffffff"), ("#ffffff", "#1e1e20")):
        assert contrast(QColor(text), over(background, QColor(paper))) > 7  # WCAG 2.1, AAA


def over(colour: QColor, paper: QColor) -> QColor:
    """What is seen of a translucent colour."""
    alpha = colour.alphaF()
    return QColor.fromRgbF(
        *(
            alpha * part + (1 - alpha) * below
            for part, below in zip(colour.getRgbF()[:3], paper.getRgbF()[:3], strict=True)
        )
    )


def contrast(one: QColor, other: QColor) -> float:
    """The contrast ratio of WCAG 2.1, from 1 to 21."""

    def luminance(colour: QColor) -> float:
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in colour.getRgbF()[:3]
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_program_starts_and_ends(tiny_bundle: Path) -> None:
    """`python app.py BUNDLE`, in a process of its own, closed as soon as it is loaded."""
    code = (
        "import sys, app, window\n"
        "show = window.ChatWindow._show_loaded\n"
        "window.ChatWindow._show_loaded = lambda self, names: (show(self, names), self.close())\n"
        "sys.exit(app.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle)],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
