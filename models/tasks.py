"""Task folders: the samples of each skill, as the router is trained on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlp_edge.errors import RouterError
from dlp_edge.manifest import ADAPTER_NAME, NAME_RULE

SPLITS = ("train", "dev")
_LINE_FORMAT = 'Each line holds {"prompt": text, "response": text, "choices": [text, ...]?}'


@dataclass(frozen=True)
class Sample:
    """One request and its answer; `choices` are the answers offered, where the task has them."""

    prompt: str
    response: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """The samples of one skill; `name` is the name of its folder and of its adapter."""

    name: str
    train: tuple[Sample, ...]
    dev: tuple[Sample, ...]


def read_tasks(folder: Path) -> list[Task]:
    """Every task of a folder, by name: FOLDER/NAME/train.jsonl and FOLDER/NAME/dev.jsonl."""
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
        if not ADAPTER_NAME.fullmatch(home.name):
            raise RouterError(
                f"{home.name!r} is no name for an adapter", f"Rename the folder: {NAME_RULE}"
            )
    return [
        Task(home.name, *(_read_samples(home / f"{split}.jsonl") for split in SPLITS))
        for home in homes
    ]


def _read_samples(path: Path) -> tuple[Sample, ...]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise RouterError(
            f"{path} cannot be read ({error.strerror})",
            "Give each task folder a train.jsonl and a dev.jsonl",
        ) from error
    except UnicodeDecodeError as error:
        raise RouterError(f"{path} is not UTF-8 text ({error.reason})", _LINE_FORMAT) from error
    samples = tuple(
        _parse_sample(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not samples:
        raise RouterError(f"{path} holds no samples", _LINE_FORMAT)
    return samples


def _parse_sample(line: str, where: str) -> Sample:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RouterError(f"{where} is not JSON ({error})", _LINE_FORMAT) from error
    if not isinstance(record, dict):
        raise RouterError(f"{where} is not a JSON object", _LINE_FORMAT)
    for key in ("prompt", "response"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise RouterError(f"{where} has no text for {key!r}", _LINE_FORMAT)
        try:
            record[key].encode()
        except UnicodeEncodeError as error:
            raise RouterError(f"{where} has invalid Unicode in {key!r}", "Mend it") from error
    choices = record.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise RouterError(f"{where} has 'choices' that are no list of texts", _LINE_FORMAT)
    return Sample(record["prompt"], record["response"], tuple(choices))
