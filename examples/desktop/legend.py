"""The list of adapters: their colours, and what the user wants of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tint
from PySide6.QtCore import Qt
from PySide6.QtGui import QPixmap
from PySide6.QtWidgets import QFrame, QLabel, QScrollArea, QToolButton, QVBoxLayout, QWidget

WISHES = ("auto", "pinned", "forbidden")


class Legend(QScrollArea):
    """One button per adapter; a click goes on to the next wish.

    Attributes:
        buttons: adapter name -> its button.
        wishes: adapter name -> what the user wants: "auto" leaves it to the router.
    """

    def __init__(self) -> None:
        super().__init__(widgetResizable=True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setFixedWidth(176)
        self.show_adapters([])

    def show_adapters(self, names: Sequence[str]) -> None:
        """The adapters of a newly loaded bundle."""
        content = QWidget()
        column = QVBoxLayout(content)
        column.setSpacing(2)
        title = QLabel("Skills")
        title.setObjectName("title")
        column.addWidget(title)
        self.wishes = dict.fromkeys(names, WISHES[0])
        self.buttons = {name: QToolButton() for name in names}
        for name, button in self.buttons.items():
            swatch = QPixmap(12, 12)
            swatch.fill(tint.colour(names, name))
            button.setIcon(swatch)
            button.setIconSize(swatch.size())
            button.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
            button.clicked.connect(lambda checked=False, name=name: self._change(name))
            button.setToolTip("Click to pin, again to forbid, again to leave it to the router")
            column.addWidget(button)
            self._show(name)
        column.addStretch()
        self.setWidget(content)

    def options(self) -> dict[str, Any]:
        """What is pinned or, where nothing is, forbidden: options for `Session.stream`."""
        pinned = [name for name, wish in self.wishes.items() if wish == "pinned"]
        forbidden = [name for name, wish in self.wishes.items() if wish == "forbidden"]
        return {"adapters": pinned} if pinned else {"forbid": forbidden}

    def _change(self, name: str) -> None:
        self.wishes[name] = WISHES[(WISHES.index(self.wishes[name]) + 1) % len(WISHES)]
        self._show(name)

    def _show(self, name: str) -> None:
        button, wish = self.buttons[name], self.wishes[name]
        font = button.font()
        font.setStrikeOut(wish == "forbidden")
        button.setFont(font)
        button.setText(f" {name} · pinned" if wish == "pinned" else f" {name}")
