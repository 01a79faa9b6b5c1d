"""Task files for the evaluation: 20 BIG-bench tasks from PyPI, or any data set of the hub.

    python recipes/tasks.py tasks/                              # all 20, from the package on PyPI
    python recipes/tasks.py tasks/ --only winowhy formfall
    python recipes/tasks.py tasks/ --hub gsm8k alpaca           # presets, need `datasets`
    python recipes/tasks.py tasks/ --hub chess=user/set:question:answer

Each task becomes NAME/{train,dev,test}.jsonl, lines of {"prompt", "response", "choices"?}. No
prompt, and no other wording of the same problem, is in two of the three.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pip._internal.models.index import PyPI
from platformdirs import user_cache_path
from tqdm import tqdm

PACKAGE = "bigbench"
ARCHIVE = "bigbench-1.0.0.tar.gz"
ARCHIVE_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
HOME = "bigbench-1.0.0/bigbench/benchmark_tasks/"

# The paper's tasks that the package has; a folder with subtasks is read whole.
BIG_BENCH = {
    "absnarr": "abstract_narrative_understanding",
    "colorreason": "reasoning_about_colored_objects",
    "conparakc": "contextual_parametric_knowledge_conflicts",
    "csalg": "cs_algorithms",
    "disflqa": "disfl_qa",
    "elemmath": "elementary_math_qa",
    "epireason": "epistemic_reasoning",
    "formfall": "formal_fallacies_syllogisms_negation",
    "langid": "language_identification",
    "lingpuzz": "linguistics_puzzles",
    "logdeduc": "logical_deduction",
    "objcount": "object_counting",
    "playdiag": "play_dialog_same_or_different",
    "quessel": "question_selection",
    "stratqa": "strategyqa",
    "topchat": "topical_chat",
    "trackobj": "tracking_shuffled_objects",
    "unitconv": "unit_conversion",
    "vitafact": "vitaminc_fact_verification",
    "winowhy": "winowhy",
}


@dataclass(frozen=True)
class HubTask:
    """A data set of the hub: where it is, and its columns ("a.b" reaches into a dictionary)."""

    path: str
    prompt: str
    response: str
    config: str | None = None
    instruction: str = ""


PRESETS = {
    "gsm8k": HubTask("openai/gsm8k", "question", "answer", "main"),
    "cnndm": HubTask(
        "abisee/cnn_dailymail", "article", "highlights", "3.0.0", "Summarise this article."
    ),
    "alpaca": HubTask("tatsu-lab/alpaca", "instruction", "output"),
    "newscomm": HubTask(
        "Helsinki-NLP/news_commentary",
        "translation.en",
        "translation.fr",
        "en-fr",
        "Translate into French.",
    ),
}


@dataclass(frozen=True)
class Sample:
    """A line of a task file; samples of one `problem` are wordings of the same."""

    prompt: str
    response: str
    choices: tuple[str, ...]
    problem: str

    def line(self) -> str:
        fields: dict[str, Any] = {"prompt": self.prompt, "response": self.response}
        if self.choices:
            fields["choices"] = list(self.choices)
        return json.dumps(fields, ensure_ascii=False) + "\n"


def archive() -> Path:
    """The package's source archive (358 MB), downloaded into the user's cache once."""
    chosen = os.environ.get("DLP_EDGE_CACHE")
    folder = Path(chosen) if chosen else user_cache_path("dlp-edge", appauthor=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ARCHIVE
    if not path.is_file():
        part = path.with_suffix(".part")
        found = _download(_address(), part)
        if found != ARCHIVE_SHA256:
            part.unlink()
            raise SystemExit(f"{ARCHIVE} has another SHA-256 than expected: {found}")
        part.replace(path)
    return path


def _address() -> str:
    """Where pip's index keeps the archive (PEP 691). pip itself would build the package."""
    index = os.environ.get("PIP_INDEX_URL") or PyPI.simple_url
    request = urllib.request.Request(
        f"{index.rstrip('/')}/{PACKAGE}/",
        headers={"Accept": "application/vnd.pypi.simple.v1+json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    found = next(str(file["url"]) for file in files if file["filename"] == ARCHIVE)
    return urllib.parse.urljoin(request.full_url, found)  # an index may give them relative


def _download(url: str, to: Path) -> str:
    """Downloads and returns the SHA-256."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as answer, to.open("wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=size, unit="B", unit_scale=True, desc=ARCHIVE, disable=None) as bar:
            while block := answer.read(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()


def big_bench(names: Iterable[str], longest: int) -> Iterator[tuple[str, list[Sample]]]:
    """(name, samples) of each task; the archive is read through once."""
    wanted = {BIG_BENCH[name]: name for name in names}
    samples: dict[str, list[Sample]] = {name: [] for name in wanted.values()}
    with tarfile.open(archive()) as tar:
        for member in tqdm(tar, total=11_400, desc="reading the archive", disable=None):
            task = member.name.removeprefix(HOME).split("/")[0]
            if task in wanted and member.name.endswith("/task.json"):
                file = tar.extractfile(member)
                assert file is not None  # a regular file, by its name
                samples[wanted[task]] += _samples(json.load(file), longest)
    yield from samples.items()


def _samples(task: dict[str, Any], longest: int) -> Iterator[Sample]:
    instruction = str(task.get("task_prefix", "")).strip()
    # One task gives "false" as a text, which BIG-bench's own code takes for true.
    shows_choices = bool(task.get("append_choices_to_input", True))
    for index, example in enumerate(task.get("examples", [])):
        question = str(example["input"]).strip()
        scores = example.get("target_scores") or {}
        best = max(sorted(scores), key=lambda choice: scores[choice], default="")
        target = example.get("target", best)
        response = str(target[0] if isinstance(target, list) else target).strip()
        # Another right choice ("2" beside "two") would be counted as wrong.
        choices = sorted(
            choice for choice in scores if choice == best or scores[choice] < scores[best]
        )
        # The order must not give the answer away, and must be the same on every run.
        random.Random(f"{index}{question}").shuffle(choices)
        shown = "".join(f"\nchoice: {choice}" for choice in choices) if shows_choices else ""
        prompt = "\n".join(part for part in (instruction, question) if part) + shown
        if response and len(prompt) <= longest:
            # A free answer that is none of the choices (StrategyQA's reasons) is judged as text.
            kept = tuple(choices) if response in choices else ()
            # Subtasks number the same problems alike and word them in several ways.
            yield Sample(prompt, response, kept, f"{index} {response} {sorted(choices)}")


def hub(task: HubTask, longest: int) -> list[Sample]:
    """Samples of a data set of the hub; all its splits together, since they are split anew."""
    from datasets import load_dataset

    samples = []
    for split in load_dataset(task.path, task.config).values():
        for row in tqdm(split, desc=task.path, disable=None):
            question, response = (
                str(_column(row, name)).strip() for name in (task.prompt, task.response)
            )
            prompt = "\n".join(part for part in (task.instruction, question) if part)
            if prompt and response and len(prompt) <= longest:
                samples.append(Sample(prompt, response, (), prompt))
    return samples


def _column(row: dict[str, Any], name: str) -> object:
    value: Any = row
    for part in name.split("."):
        value = value[part]
    return value


def write(folder: Path, samples: list[Sample], sizes: dict[str, int], seed: int) -> dict[str, int]:
    """Writes the splits of a task and returns their sizes.

    Each prompt and each problem is used once; a task with too few gives each split its share.
    """
    distinct = list({_plain(sample.prompt): sample for sample in samples}.values())
    problems: dict[str, list[Sample]] = {}
    for sample in distinct:
        problems.setdefault(sample.problem, []).append(sample)
    order = sorted(problems)
    rng = random.Random(seed)
    rng.shuffle(order)
    # One sample of each problem: another wording of it would teach the same.
    chosen = [rng.choice(problems[problem]) for problem in order]
    share = min(1.0, len(chosen) / sum(sizes.values()))
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, size in sizes.items():
        lines, chosen = chosen[: int(size * share)], chosen[int(size * share) :]
        (folder / f"{split}.jsonl").write_text("".join(s.line() for s in lines), encoding="utf-8")
        written[split] = len(lines)
    return written


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", choices=sorted(BIG_BENCH), metavar="NAME")
    parser.add_argument(
        "--hub",
        nargs="*",
        metavar="TASK",
        help=f"{', '.join(PRESETS)}, or NAME=DATASET:PROMPT_COLUMN:RESPONSE_COLUMN",
    )
    parser.add_argument("--train", type=int, default=900)
    parser.add_argument("--dev", type=int, default=100)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--longest", type=int, default=1600, help="characters of a prompt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = {split: getattr(arguments, split) for split in ("train", "dev", "test")}
    tasks: Iterable[tuple[str, list[Sample]]]
    if arguments.hub:
        chosen = (_hub_task(text) for text in arguments.hub)
        tasks = ((name, hub(task, arguments.longest)) for name, task in chosen)
    else:
        tasks = big_bench(arguments.only or BIG_BENCH, arguments.longest)
    for name, samples in tasks:
        written = write(arguments.out / name, samples, sizes, arguments.seed)
        print(name, *(f"{split} {count}" for split, count in written.items()), file=sys.stderr)


def _hub_task(text: str) -> tuple[str, HubTask]:
    if text in PRESETS:
        return text, PRESETS[text]
    name, _, rest = text.partition("=")
    parts = rest.split(":")
    if len(parts) != 3:
        raise SystemExit(f"{text!r} is neither a preset nor NAME=DATASET:PROMPT:RESPONSE")
    return name, HubTask(*parts)


if __name__ == "__main__":
    main()
