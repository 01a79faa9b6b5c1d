"""A chat with a dlp-edge bundle.

    python examples/desktop/app.py [BUNDLE]

Without a bundle it opens the one that `dlp-edge demo` made or, where there is none, asks for one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PySide6.QtCore import QTimer
from PySide6.QtWidgets import QApplication
from window import ChatWindow


def main() -> int:
    parser = argparse.ArgumentParser(description="A chat with a dlp-edge bundle.")
    parser.add_argument("bundle", type=Path, nargs="?", help="default: the demo's")
    bundle = parser.parse_args().bundle or demo_bundle()
    app = QApplication(sys.argv[:1])
    app.setStyle("Fusion")  # the same on every system, and it follows the light or dark scheme
    window = ChatWindow()
    window.show()
    begin = window.choose_bundle if bundle is None else lambda: window.open_bundle(bundle)
    QTimer.singleShot(0, begin)
    return app.exec()


def demo_bundle() -> Path | None:
    """The demo's bundle, if it has been made."""
    try:
        from dlp_edge.demo.demo import bundle_folder

        folder = bundle_folder()
    except ImportError:  # the demo needs the `export` extra
        return None
    return folder if folder.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
