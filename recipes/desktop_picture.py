"""The README's picture of the desktop example, drawn off screen with a real bundle.

    python recipes/desktop_picture.py BUNDLE docs/desktop.png [--font Inter] [--dark]

Needs PySide6 and a font; the picture in the README has Inter (Debian: fonts-inter).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "desktop"))
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

from PySide6.QtGui import QColor, QFont, QPalette
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication
from window import ChatWindow, State

PROMPTS = (
    "Bianca has 28 shells. Bianca gives 10 to Olivia. How many shells does Bianca have now?",
    "Mail Leo that lunch is at 12 on Monday. And then: "
    "Write an SQL query for the price of all books with year above 1990.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--font", default="Inter")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    app = QApplication([])
    app.setStyle("Fusion")
    app.setFont(QFont(arguments.font, 11))
    if arguments.dark:
        app.setPalette(QPalette(QColor("#2c2c2e"), QColor("#1c1c1e")))
    window = ChatWindow()
    window.resize(940, 560)
    window.show()
    window.open_bundle(arguments.bundle)
    wait_while(window, "loading")
    for prompt in PROMPTS:
        window.prompt.setText(prompt)
        window.send.click()
        wait_while(window, "answering")
    window.prompt.clearFocus()
    QTest.qWait(100)
    window.grab().save(str(arguments.picture))
    window.close()


def wait_while(window: ChatWindow, state: State) -> None:
    """Lets the window live until it leaves a state."""
    while window.state == state:
        QTest.qWait(20)
    if window.error.isVisible():
        raise SystemExit(window.error.text())


if __name__ == "__main__":
    main()
