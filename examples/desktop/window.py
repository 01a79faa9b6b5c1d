"""The chat window: asks the assistant for what the user wants, shows what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from assistant import Assistant
from legend import Legend
from PySide6 import QtWidgets
from PySide6.QtCore import Qt
from PySide6.QtGui import QCloseEvent, QKeySequence
from PySide6.QtWidgets import QHBoxLayout, QLabel, QPushButton, QVBoxLayout
from transcript import Transcript

from dlp_edge import Chunk, Reply

if TYPE_CHECKING:
    from dlp_edge import Session, Stream

State = Literal["empty", "loading", "ready", "answering"]
STYLE = Path(__file__).with_name("style.qss").read_text(encoding="utf-8")
OPEN_FIRST = "Open a bundle to begin"
MAX_NEW_TOKENS = 512
TEMPERATURE = 0.8  # when answering again: greedily it would be the same answer


class ChatWindow(QtWidgets.QMainWindow):
    """A conversation with an assistant, which ends with the window."""

    def __init__(self) -> None:
        super().__init__()
        self.assistant = Assistant()
        self.legend = Legend()
        self.transcript = Transcript()
        self.error = QLabel(wordWrap=True, textFormat=Qt.TextFormat.PlainText)
        self.error.setObjectName("error")
        self.prompt = QtWidgets.QLineEdit(
            placeholderText="Ask for something, or for two things at once"
        )
        self.send, self.stop = QPushButton("Send"), QPushButton("Stop")
        self.status = QLabel()
        self.progress = QtWidgets.QProgressBar(maximum=1000, textVisible=False)
        tools = QtWidgets.QToolBar(movable=False)
        self.new_chat = tools.addAction("New chat", QKeySequence.StandardKey.New)
        self.again = tools.addAction("Answer again")
        self.open = tools.addAction("Open bundle…", QKeySequence.StandardKey.Open)
        self.addToolBar(tools)
        self._lay_out()
        self._connect()
        self._asked: str | None = None  # the question that the answer under way is to
        self._writing = False  # whether that answer has begun
        self._enter("empty", OPEN_FIRST)

    def open_bundle(self, bundle: Path) -> None:
        """Loads a bundle, in place of the one before and its conversation."""
        self.transcript.restart()
        self.legend.show_adapters([])
        self.setWindowTitle(f"{bundle.name} · dlp-edge")
        self._enter("loading", f"Loading {bundle.name}")
        self.assistant.open(bundle)

    def choose_bundle(self) -> None:
        """Lets the user pick a bundle's folder."""
        folder = QtWidgets.QFileDialog.getExistingDirectory(self, "Open a bundle")
        if folder:
            self.open_bundle(Path(folder))

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802 - Qt's name
        """Ends what is under way; the window is gone before that has ended."""
        self.hide()
        self.assistant.close()
        super().closeEvent(event)

    def _lay_out(self) -> None:
        composer = QHBoxLayout()
        for part in (self.prompt, self.send, self.stop):
            composer.addWidget(part)
        column = QVBoxLayout()
        column.addWidget(self.transcript)
        column.addWidget(self.error)
        column.addLayout(composer)
        content = QtWidgets.QWidget()
        row = QHBoxLayout(content)
        row.addWidget(self.legend)
        row.addLayout(column)
        self.setCentralWidget(content)
        self.statusBar().addPermanentWidget(self.progress)
        self.statusBar().addWidget(self.status)
        self.statusBar().setSizeGripEnabled(False)
        self.setStyleSheet(STYLE)
        self.resize(940, 640)

    def _connect(self) -> None:
        self.send.clicked.connect(self._ask)
        self.prompt.returnPressed.connect(self._ask)
        self.stop.clicked.connect(self.assistant.stop)
        self.new_chat.triggered.connect(self._begin_chat)
        self.again.triggered.connect(self._ask_again)
        self.open.triggered.connect(self.choose_bundle)
        self.assistant.loading.connect(self._show_loading)
        self.assistant.loaded.connect(self._show_loaded)
        self.assistant.wrote.connect(self._show_chunks)
        self.assistant.answered.connect(self._show_answered)
        self.assistant.failed.connect(self._show_error)

    def _enter(self, state: State, message: str) -> None:
        """What can be done in a state, and what the status bar says of it."""
        self.state = state
        self.prompt.setEnabled(state in ("ready", "answering"))
        self.send.setEnabled(state == "ready")
        self.send.setHidden(state == "answering")
        self.stop.setVisible(state == "answering")
        self.new_chat.setEnabled(state == "ready")
        self.again.setEnabled(state == "ready" and not self.transcript.is_empty)
        self.progress.setVisible(state == "loading")
        self.status.setText(message)
        self.error.hide()
        if state == "ready":
            self.prompt.setFocus()

    def _ask(self) -> None:
        text, options = self.prompt.text().strip(), self._options()
        if text and self.state == "ready":
            self.prompt.clear()
            self.transcript.ask(text)
            self._answer(text, lambda chat: chat.stream(text, **options))

    def _ask_again(self) -> None:
        options = self._options()
        self._answer(None, lambda chat: chat.regenerate(temperature=TEMPERATURE, **options))

    def _answer(self, question: str | None, begin: Callable[[Session], Stream]) -> None:
        self._asked, self._writing = question, False
        self._enter("answering", "Reading")
        self.assistant.answer(begin)

    def _options(self) -> dict[str, Any]:
        return {"max_new_tokens": MAX_NEW_TOKENS, "requests": "auto", **self.legend.options()}

    def _begin_chat(self) -> None:
        self.transcript.restart()
        self.assistant.new_chat()
        self._enter("ready", "")

    def _show_loading(self, stage: str, fraction: float) -> None:
        self.progress.setValue(round(1000 * fraction))
        self.status.setText(f"Loading: {stage}")

    def _show_loaded(self, adapters: list[str]) -> None:
        self.transcript.adapters = adapters
        self.legend.show_adapters(adapters)
        self._enter("ready", "")

    def _show_chunks(self, chunks: list[Chunk], reply: Reply) -> None:
        if self.state != "answering" or not reply.usage.completion_tokens:
            return
        if not self._writing:
            self._writing = True
            self.transcript.begin_answer()
        self.transcript.write(chunks)
        self.status.setText(_speed(reply))

    def _show_answered(self, reply: Reply, dropped: int) -> None:
        if self.state != "answering":
            return
        if self._writing:
            self.transcript.end_answer(reply)
        else:
            self._take_back()
        forgotten = f" · {dropped} oldest messages forgotten" if dropped else ""
        self._enter("ready", _speed(reply) + forgotten)

    def _show_error(self, cause: str, remedy: str) -> None:
        if self.state == "answering":
            self._take_back()
            self._enter("ready", "")
        else:
            self._enter("empty", OPEN_FIRST)
        self.error.setText(f"{cause}\n{remedy}")
        self.error.show()

    def _take_back(self) -> None:
        """A question without any answer is no part of the conversation: it can be asked again."""
        if self._asked is not None:
            self.transcript.take_back()
            self.prompt.setText(self._asked)


def _speed(reply: Reply) -> str:
    times, count = reply.timings, reply.usage.completion_tokens
    if not count:
        return "Stopped"
    return (
        f"{count} tokens · {times.decode_rate:.0f} tokens/s"
        f" · first token after {times.first_token * 1e3:.0f} ms"
    )
