"""The conversation as text, each sentence on the colour of the adapters that wrote it."""

from __future__ import annotations

from collections.abc import Sequence

import tint
from PySide6 import QtGui
from PySide6.QtCore import Qt
from PySide6.QtGui import QTextBlockFormat, QTextCharFormat, QTextCursor
from PySide6.QtWidgets import QFrame, QTextEdit

from dlp_edge import Chunk, Reply

LINE_SEPARATOR = "\u2028"  # breaks a line inside a paragraph


class Transcript(QTextEdit):
    """Text that grows at its end.

    Attributes:
        adapters: the bundle's, in its order, which gives them their colours.
    """

    def __init__(self) -> None:
        super().__init__(readOnly=True, undoRedoEnabled=False)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.adapters: Sequence[str] = ()
        self.document().setDocumentMargin(24)
        self._turns: list[tuple[int, int]] = []  # where their questions and answers begin
        self._sentence, self._space = -1, ""  # white space is coloured only within a sentence

    @property
    def is_empty(self) -> bool:
        return not self._turns

    def restart(self) -> None:
        """A conversation that has not begun."""
        self.clear()
        self._turns = []

    def ask(self, text: str) -> None:
        """The user's words."""
        start = self._begin_block(before=32, after=20, left=14, line_height=120)
        self._insert(text)
        self._turns.append((start, self._end().position()))

    def take_back(self) -> None:
        """Removes the last question, which got no answer."""
        self._cut(self._turns.pop()[0])

    def begin_answer(self) -> None:
        """An answer to the last question, in place of the one that it may have had."""
        self._cut(self._turns[-1][1])
        self._begin_block()
        self._sentence, self._space = -1, ""

    def write(self, chunks: Sequence[Chunk]) -> None:
        """What the answer has grown by."""
        for chunk in chunks:
            style = QTextCharFormat()
            style.setBackground(tint.blend(self.adapters, chunk.fusion))
            style.setToolTip(tint.label(chunk.fusion))
            self._insert(self._space, style if chunk.sentence == self._sentence else None)
            text = chunk.text.rstrip()
            self._insert(text, style)
            self._sentence, self._space = chunk.sentence, chunk.text[len(text) :]

    def end_answer(self, reply: Reply) -> None:
        """Says below the answer who wrote it, once for each change."""
        self._begin_block(before=12)
        small = QTextCharFormat()
        small.setFontPointSize(self.font().pointSizeF() * 0.85)
        before = None
        for sentence in reply.sentences:
            if sentence.fusion != before:
                self._insert("" if before is None else "  →  ", small)
                tinted = QTextCharFormat(small)
                tinted.setBackground(tint.blend(self.adapters, sentence.fusion))
                self._insert(f"\u00a0{tint.label(sentence.fusion)}\u00a0", tinted)
                before = sentence.fusion

    def paintEvent(self, event: QtGui.QPaintEvent) -> None:  # noqa: N802 - Qt's name
        """Draws the user's words on rounded rectangles, which rich text does not have."""
        painter = QtGui.QPainter(self.viewport())
        painter.setRenderHint(painter.RenderHint.Antialiasing)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(self.palette().alternateBase())
        painter.translate(0, -self.verticalScrollBar().value())
        for question, _ in self._turns:
            layout = self.document().findBlock(question + 1).layout()
            area = layout.lineAt(0).naturalTextRect()
            for i in range(1, layout.lineCount()):
                area |= layout.lineAt(i).naturalTextRect()
            area.translate(layout.position())
            painter.drawRoundedRect(area.adjusted(-14, -9, 14, 9), 14, 14)
        painter.end()
        super().paintEvent(event)

    def _begin_block(
        self, before: float = 0, after: float = 0, left: float = 0, line_height: float = 150
    ) -> int:
        """A new paragraph (margins in pixels, line height in %); where it can be cut off."""
        block = QTextBlockFormat()
        block.setTopMargin(before)
        block.setBottomMargin(after)
        block.setLeftMargin(left)
        block.setLineHeight(line_height, block.LineHeightTypes.ProportionalHeight.value)
        cursor = self._end()
        position = cursor.position()
        if position:
            cursor.insertBlock(block, QTextCharFormat())
        else:  # every document has one
            cursor.setBlockFormat(block)
        return position

    def _insert(self, text: str, style: QTextCharFormat | None = None) -> None:
        self._end().insertText(text.replace("\n", LINE_SEPARATOR), style or QTextCharFormat())
        self.verticalScrollBar().setValue(self.verticalScrollBar().maximum())

    def _cut(self, position: int) -> None:
        cursor = self._end()
        cursor.setPosition(position, QTextCursor.MoveMode.KeepAnchor)
        cursor.removeSelectedText()

    def _end(self) -> QTextCursor:
        cursor = QTextCursor(self.document())
        cursor.movePosition(QTextCursor.MoveOperation.End)
        return cursor
