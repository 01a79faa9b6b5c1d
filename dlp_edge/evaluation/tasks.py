"""The tasks of an evaluation: folders of samples, NAME/test.jsonl or NAME/dev.jsonl."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dlp_edge.errors import UsageError
from dlp_edge.evaluation.metrics import Kind, kind_of
from dlp_edge.tasks.samples import Sample, read_samples

SPLITS = ("test", "dev")  # the first that a task has


@dataclass(frozen=True)
class EvalTask:
    """The test samples of a task; its folder and its adapter are called `name`.

    Attributes:
        kind: how most of its samples are scored.
        prompts: of its training samples, or of the test samples without any; their common text
            is the task's instruction line.
    """

    name: str
    split: str
    kind: Kind
    samples: tuple[Sample, ...]
    prompts: tuple[str, ...]


def read_eval_tasks(
    folder: Path,
    split: str | None = None,
    only: Collection[str] = (),
    limit: int | None = None,
    seed: int = 0,
) -> list[EvalTask]:
    """The tasks of a folder, by name.

    Args:
        split: the split to test; None takes `test`, or `dev` if there is no `test`.
        only: task names; empty takes all.
        limit: maximum samples per task, the first of a seeded order, so that a larger limit only
            adds samples.

    Raises:
        UsageError: there are no tasks, no such task, or none with such a split.
        RouterError: a file is invalid (see `read_samples`).
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "Name a folder of task folders")
    homes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    for name in only:
        if name not in [home.name for home in homes]:
            raise UsageError(f"{folder} has no task {name!r}", "Check the name")
    wanted = [home for home in homes if not only or home.name in only]
    splits = SPLITS if split is None else (split,)
    tasks = []
    for home in wanted:
        file = next((f for s in splits if (f := home / f"{s}.jsonl").is_file()), None)
        if file is not None:
            tasks.append(_read(home, file, limit, seed))
    if not tasks:
        named = " or ".join(f"NAME/{name}.jsonl" for name in splits)
        raise UsageError(f"{folder} holds no task with {named}", "Check the folder and the split")
    return tasks


def _read(home: Path, file: Path, limit: int | None, seed: int) -> EvalTask:
    samples = list(read_samples(file))
    random.Random(f"{seed} {home.name}").shuffle(samples)
    train = home / "train.jsonl"
    known = read_samples(train) if train.is_file() else samples
    kept = tuple(samples[:limit])
    kind: Kind = Counter(kind_of(sample) for sample in samples).most_common(1)[0][0]
    prompts = tuple(sample.prompt for sample in known)
    return EvalTask(home.name, file.stem, kind, kept, prompts)
