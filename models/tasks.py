"""Reads task folders: the samples of each skill that the router is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dlp_edge.bundle.manifest import check_adapter_name
from dlp_edge.errors import RouterError
from dlp_edge.tasks.boilerplate import CommonText
from dlp_edge.tasks.samples import Sample, read_samples

SPLITS = ("train", "dev")
LEAST_SAMPLES = 2  # of a split; what samples have in common cannot be told from one
LEAST_OUT_OF_SCOPE = 20  # texts of the user's own
MEASURED_STEP = 4  # every fourth of them is measured on, not taught
SAME_SHARE = 0.5  # of a task's prompts: as many found in another task make them one task


@dataclass(frozen=True)
class Task:
    """The samples of one skill; `name` is the name of its folder and of its adapter."""

    name: str
    train: tuple[Sample, ...]
    dev: tuple[Sample, ...]

    @cached_property
    def common(self) -> CommonText:
        """The text that the training prompts have in common."""
        return CommonText([sample.prompt for sample in self.train])


def read_tasks(folder: Path) -> list[Task]:
    """Every task of a folder, by name: FOLDER/NAME/train.jsonl and FOLDER/NAME/dev.jsonl.

    Raises:
        RouterError: fewer than two tasks, a folder whose name no adapter can have, a file that is
            missing or wrong, too few samples, or two tasks with the same prompts.
    """
    if not folder.is_dir():
        raise RouterError(
            f"{folder} is not a folder", "Name a folder with one folder of samples for each task"
        )
    homes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(homes) < 2:
        raise RouterError(
            f"{folder} holds {len(homes)} task folder(s), and a router chooses between two or more",
            "Add a folder for each task, with train.jsonl and dev.jsonl",
        )
    for home in homes:
        wrong = check_adapter_name(home.name)
        if wrong is not None:
            raise RouterError(
                f"{home.name!r} is not a valid adapter name", f"Rename the folder. {wrong}"
            )
    seen: dict[str, str] = {}
    for home in homes:
        other = seen.setdefault(home.name.casefold(), home.name)
        if other != home.name:
            raise RouterError(
                f"the tasks {other} and {home.name} differ in case only", "Rename one of the two"
            )
    tasks = [Task(home.name, *(_read_split(home, split) for split in SPLITS)) for home in homes]
    _check_distinct(tasks)
    return tasks


def read_out_of_scope(path: Path, tasks: Sequence[Task]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts that no task is for: those to teach, and those to measure on.

    Raises:
        RouterError: the file is missing or wrong, has too few texts, or some of them are a
            task's own prompts.
    """
    texts = list(dict.fromkeys(each.prompt for each in read_samples(path, response_needed=False)))
    if len(texts) < LEAST_OUT_OF_SCOPE:
        raise RouterError(
            f"{path} holds {len(texts)} different texts",
            f"Give {LEAST_OUT_OF_SCOPE} or more: one in {MEASURED_STEP} is measured on",
        )
    owners = {
        sample.prompt.strip().casefold(): task.name
        for task in tasks
        for sample in (*task.train, *task.dev)
    }
    owned = [owners[key] for text in texts if (key := text.strip().casefold()) in owners]
    if owned:
        raise RouterError(
            f"{len(owned)} of the {len(texts)} texts in {path} are prompts of "
            f"{', '.join(sorted(set(owned))[:5])}",
            "Take them out of one of the two",
        )
    measured = texts[MEASURED_STEP - 1 :: MEASURED_STEP]
    return tuple(text for text in texts if text not in set(measured)), tuple(measured)


def _read_split(home: Path, split: str) -> tuple[Sample, ...]:
    path = home / f"{split}.jsonl"
    if not path.is_file():
        raise RouterError(
            f"there is no {path}", "Give each task folder a train.jsonl and a dev.jsonl"
        )
    samples = read_samples(path)
    if len(samples) < LEAST_SAMPLES:
        raise RouterError(
            f"{path} holds {len(samples)} sample",
            f"Give {LEAST_SAMPLES} or more, better some hundreds; or add the skill to a finished "
            "bundle with `dlp-edge add`, which takes few examples",
        )
    return samples


def _check_distinct(tasks: Sequence[Task]) -> None:
    """Raise RouterError if two tasks have mostly the same prompts, so that no router can separate
    them."""
    prompts = {task.name: {sample.prompt for sample in task.train} for task in tasks}
    for index, task in enumerate(tasks):
        for other in tasks[:index]:
            shared = len(prompts[task.name] & prompts[other.name])
            if shared > SAME_SHARE * min(len(prompts[task.name]), len(prompts[other.name])):
                raise RouterError(
                    f"the tasks {other.name} and {task.name} have {shared} prompts in common, "
                    "so no router can tell them apart",
                    "Make one task of them, or give each its own prompts",
                )
