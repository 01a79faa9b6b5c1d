"""What to give as `on_progress`, so that a bar of tqdm or rich shows it.

with tqdm(total=100) as bar:
    Runtime("bundle", on_progress=to_tqdm(bar))

with rich.progress.Progress() as progress:
    Runtime("bundle", on_progress=to_rich(progress, progress.add_task("bundle", total=100)))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, float], None]
"""Called with the step that begins and the fraction done, 0 to 1."""


def to_tqdm(bar: Any) -> Progress:
    """Moves a tqdm bar, whose postfix names the step; without a total it gets one of 100."""
    bar.total = bar.total or 100

    def tell(step: str, fraction: float) -> None:
        bar.set_postfix_str(step, refresh=False)
        bar.update(max(0, round(bar.total * fraction) - bar.n))

    return tell


def to_rich(progress: Any, task: Any) -> Progress:
    """Moves a task of a `rich.progress.Progress` that has a total; its description names the
    step."""
    [total] = [known.total for known in progress.tasks if known.id == task]

    def tell(step: str, fraction: float) -> None:
        progress.update(task, completed=total * fraction, description=step)

    return tell
