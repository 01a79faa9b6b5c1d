"""Whether the desktop example's window stays alive: the gaps between ticks of its event loop.

    python benchmarks/window_gaps.py BUNDLE

A timer of 1 ms ticks in the window's thread, off screen, while the window loads the bundle and
then answers with 100 tokens; a gap is how long a click would have waited. Beside it the same with
nothing to do: what the machine itself does to a timer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "desktop"))
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import window as desktop
from PySide6.QtCore import QCoreApplication, QEventLoop, Qt, QTimer
from PySide6.QtWidgets import QApplication


class Ticks:
    """Ticks of the event loop since it was made."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self._timer = QTimer(timerType=Qt.TimerType.PreciseTimer, interval=1)
        self._timer.timeout.connect(lambda: self.times.append(time.perf_counter()))
        self._timer.start()

    def gaps(self) -> list[float]:
        """Milliseconds between neighbours, the longest first; ends the ticking."""
        self._timer.stop()
        pairs = zip(self.times, self.times[1:], strict=False)
        return sorted(((b - a) * 1e3 for a, b in pairs), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    QApplication([])
    desktop.MAX_NEW_TOKENS = 100
    window = desktop.ChatWindow()
    window.show()
    report("idle, 3 s", idle)
    report("loading", lambda: load(window, bundle))
    for _ in range(3):
        report("100 tokens", lambda: answer(window))
    window.close()


def report(what: str, act: Callable[[], None]) -> None:
    ticks = Ticks()
    act()
    gaps = ticks.gaps()
    seconds = ticks.times[-1] - ticks.times[0]
    print(
        f"{what:<12} {seconds:6.2f} s  ticks {len(gaps):5}  longest gaps "
        + ", ".join(f"{gap:.1f}" for gap in gaps[:5])
        + f" ms  p99 {gaps[len(gaps) // 100]:.1f} ms"
    )


def idle() -> None:
    end = time.perf_counter() + 3
    while time.perf_counter() < end:
        wait_for_events()


def wait_for_events() -> None:
    """One turn of the event loop; unlike QTest.qWait it adds no sleep of its own."""
    QCoreApplication.processEvents(QEventLoop.ProcessEventsFlag.WaitForMoreEvents)


def load(window: desktop.ChatWindow, bundle: Path) -> None:
    window.open_bundle(bundle)
    wait_while(window, "loading")


def answer(window: desktop.ChatWindow) -> None:
    """To a question that takes the base model more than 100 tokens."""
    window.legend.wishes = dict.fromkeys(window.legend.wishes, "forbidden")
    window.prompt.setText("Tell me a very long story about a lighthouse.")
    window.send.click()
    wait_while(window, "answering")


def wait_while(window: desktop.ChatWindow, state: desktop.State) -> None:
    while window.state == state:
        wait_for_events()
    if window.error.isVisible():
        raise SystemExit(window.error.text())


if __name__ == "__main__":
    main()
