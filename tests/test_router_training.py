"""Training the router: task files, examples, the router folder, the command line."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dlp_edge.cli import main
from dlp_edge.errors import RouterError, UsageError
from dlp_edge.export.router import router_labels
from dlp_edge.models.router_examples import (
    CommonText,
    held_out_examples,
    training_examples,
)
from dlp_edge.models.router_tokenizer import open_tokenizer, train_tokenizer
from dlp_edge.models.tasks import Sample, Task, read_tasks
from dlp_edge.models.training import train_router

SAMPLES = {
    "shout": lambda i: (f"Please shout this loudly: bird {i} sings", f"BIRD {i} SINGS!"),
    "count": lambda i: (f"How many are {i} cats and {i} dogs?", f"There are {2 * i}. That is all."),
    "greet": lambda i: (f"Write a greeting for guest number {i}", f"Dear guest {i}. Welcome here."),
}


def tiny_task(name: str) -> Task:
    samples = [Sample(*SAMPLES[name](i)) for i in range(50)]
    return Task(name, tuple(samples[:35]), tuple(samples[35:]))


@pytest.fixture
def tasks() -> list[Task]:
    return [tiny_task(name) for name in sorted(SAMPLES)]


class TestExamples:
    def test_sentences_belong_to_their_task(self, tasks: list[Task]) -> None:
        examples = held_out_examples(tasks, random.Random(0)).sentences
        names = [task.name for task in tasks]
        openings = {"BIRD": "shout", "There": "count", "That": "count", "Dear": "greet"}
        seen = set()
        for example in examples:
            last = example.generated.split()[-1]
            for opening, name in openings.items():
                if opening == last:
                    assert names[example.labels[0]] == name
                    seen.add(opening)
        assert seen == set(openings)

    def test_an_unanswered_composite_belongs_to_all_of_its_tasks(self, tasks: list[Task]) -> None:
        blends = held_out_examples(tasks, random.Random(0)).blends
        assert {len(blend.labels) for blend in blends} == {2, 3}
        assert all(blend.generated == "" for blend in blends)

    def test_are_the_same_for_the_same_seed(self, tasks: list[Task]) -> None:
        first, again, other = (
            training_examples(tasks, random.Random(seed)) for seed in ("1", "1", "2")
        )
        assert first == again
        assert first != other

    def test_two_tasks_make_composites_of_two(self, tasks: list[Task]) -> None:
        blends = held_out_examples(tasks[:2], random.Random(0)).blends
        assert all(sorted(blend.labels) == [0, 1] for blend in blends)

    def test_common_text_is_found_and_removed(self) -> None:
        choices = ("red", "blue")
        samples = [
            Sample(
                f"Name the colour.\nThe {i} th {i + 1} thing\nchoice: red\nchoice: blue",
                "red",
                choices,
            )
            for i in range(40)
        ]
        common = CommonText([sample.prompt for sample in samples])
        assert common.strip(samples[3]) == "3 th 4"

    def test_a_prompt_without_common_text_has_no_second_form(self) -> None:
        prompts = [f"{i} {i + 1} {i + 2} {i + 3}" for i in range(40)]
        assert CommonText(prompts).strip(Sample(prompts[0], "x")) is None


class TestTaskFolders:
    @pytest.fixture
    def folder(self, tiny_tasks: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_tasks, tmp_path / "tasks"))

    def test_reads_names_and_choices(self, folder: Path) -> None:
        line = {"prompt": "p", "response": "r", "choices": ["r", "s"]}
        (folder / "email" / "dev.jsonl").write_text(json.dumps(line))
        tasks = read_tasks(folder)
        assert [task.name for task in tasks] == ["email", "sql", "sums"]
        assert tasks[0].dev == (Sample("p", "r", ("r", "s")),)

    @pytest.mark.parametrize(
        ("line", "cause"),
        [
            ("{", "line 2 is not JSON"),
            ("[]", "line 2 is not a JSON object"),
            ('{"prompt": "p"}', "no text for 'response'"),
            ('{"prompt": " ", "response": "r"}', "no text for 'prompt'"),
            ('{"prompt": "p", "response": "r", "choices": [1]}', "'choices'"),
        ],
    )
    def test_names_the_bad_line(self, folder: Path, line: str, cause: str) -> None:
        path = folder / "sql" / "train.jsonl"
        path.write_text('{"prompt": "p", "response": "r"}\n' + line)
        with pytest.raises(RouterError, match=cause) as caught:
            read_tasks(folder)
        assert str(path) in caught.value.cause

    @pytest.mark.parametrize(
        ("damage", "cause"),
        [
            (shutil.rmtree, "is not a folder"),
            (
                lambda folder: shutil.rmtree(folder / "sql") or shutil.rmtree(folder / "email"),
                "holds 1 task folder",
            ),
            (lambda folder: (folder / "sql" / "dev.jsonl").unlink(), "cannot be read"),
            (lambda folder: (folder / "sql" / "dev.jsonl").write_text("\n"), "no samples"),
            (lambda folder: (folder / "sql" / "dev.jsonl").write_bytes(b"\xff"), "not UTF-8"),
        ],
    )
    def test_refuses_a_bad_folder(
        self, folder: Path, damage: Callable[[Path], object], cause: str
    ) -> None:
        damage(folder)
        with pytest.raises(RouterError, match=cause):
            read_tasks(folder)


@pytest.fixture(scope="module")
def again(
    tiny_tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A second training with the same seed, by the command line, and the JSON it printed."""
    out = tmp_path_factory.mktemp("again") / "router"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main.main(["train-router", str(tiny_tasks), "-o", str(out), "--json"]) == 0
    return out, json.loads(printed.getvalue())


class TestTraining:
    def test_learns_the_tasks(self, tiny_router: Path) -> None:
        card = json.loads((tiny_router / "router.json").read_text())
        assert card["settings"]["labels"] == ["email", "sql", "sums"]
        assert min(card["accuracy"].values()) > 0.9
        assert card["settings"]["temperature"] >= 1

    def test_same_seed_same_router(
        self, tiny_router: Path, again: tuple[Path, dict[str, Any]]
    ) -> None:
        for name in ("router.safetensors", "tokenizer.json"):
            assert (again[0] / name).read_bytes() == (tiny_router / name).read_bytes()

    def test_command_line_prints_one_json_document(
        self, again: tuple[Path, dict[str, Any]]
    ) -> None:
        out, document = again
        assert document["parameters"] > 1_000_000
        assert router_labels(out) == tuple(document["settings"]["labels"])

    def test_takes_a_tokenizer(self, tiny_router: Path) -> None:
        by_folder = open_tokenizer(tiny_router)
        by_file = open_tokenizer(str(tiny_router / "tokenizer.json"))
        assert by_folder.get_vocab() == by_file.get_vocab()

    def test_trains_the_same_tokenizer_again(self, tasks: list[Task]) -> None:
        assert train_tokenizer(tasks).to_str() == train_tokenizer(tasks).to_str()

    def test_refuses_a_tokenizer_with_gaps(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        Tokenizer(WordLevel({"a": 0, "b": 7}, unk_token="a")).save(str(path))
        with pytest.raises(RouterError, match="do not run from 0 to 1"):
            open_tokenizer(path)

    def test_refuses_what_is_no_tokenizer(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_text("{}")
        with pytest.raises(RouterError, match="cannot be read"):
            open_tokenizer(path)

    def test_leaves_a_foreign_folder_alone(self, tiny_tasks: Path, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("mine")
        with pytest.raises(UsageError, match="was not written by dlp-edge"):
            train_router(tiny_tasks, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
