"""Training the router: task files, examples, the router folder, the command line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dlp_edge.cli import main
from dlp_edge.errors import RouterError, UsageError
from dlp_edge.export.router import router_labels
from dlp_edge.models.evaluation import Judged, calibration_error, confusions, judged
from dlp_edge.models.router_examples import ExampleMaker
from dlp_edge.models.router_tokenizer import open_tokenizer, train_tokenizer
from dlp_edge.models.tasks import Task, read_tasks
from dlp_edge.models.training import train_router
from dlp_edge.models.training_texts.augmentation import cut, with_gaps, with_typos
from dlp_edge.models.training_texts.grammar_texts import WHOLE, from_grammar, grammar
from dlp_edge.models.training_texts.out_of_scope import OutOfScopeTexts
from dlp_edge.models.training_texts.scope import Scope
from dlp_edge.tasks.boilerplate import CommonText
from dlp_edge.tasks.samples import Sample

pytestmark = pytest.mark.slow

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
        names = [task.name for task in tasks]
        openings = {"BIRD": "shout", "There": "count", "That": "count", "Dear": "greet"}
        seen = set()
        for each in (2, 3):
            for example in ExampleMaker(tasks, "dev", random.Random(0)).composites(50, each)[1]:
                last = example.generated.split()[-1]
                if last in openings:
                    assert names[example.label] == openings[last]
                    seen.add(last)
        assert seen == set(openings)

    def test_an_unanswered_composite_leans_to_what_was_asked_first(self, tasks: list[Task]) -> None:
        blends = ExampleMaker(tasks, "dev", random.Random(0)).composites(50, 3)[0]
        signs = {"count": "How many", "greet": "Write a greeting", "shout": "Please shout"}
        for blend in blends:
            assert len(blend.weights) == 3
            assert blend.generated == ""
            assert math.isclose(sum(blend.weights.values()), 1)
            assert blend.prompt.startswith(signs[tasks[blend.label].name])

    def test_are_the_same_for_the_same_seed(self, tasks: list[Task]) -> None:
        first, again, other = (
            ExampleMaker(tasks, "train", random.Random(seed)).training() for seed in ("1", "1", "2")
        )
        assert first == again
        assert first != other

    def test_two_tasks_make_composites_of_two(self, tasks: list[Task]) -> None:
        blends = ExampleMaker(tasks[:2], "dev", random.Random(0)).composites(20, 3)[0]
        assert all(sorted(blend.weights) == [0, 1] for blend in blends)

    def test_other_texts_are_nobodys_and_dev_has_its_own(self, tasks: list[Task]) -> None:
        examples = ExampleMaker(tasks, "train", random.Random(0)).training()
        assert sum(3 in example.weights for example in examples) > 0.1 * len(examples)
        taught, kept = (OutOfScopeTexts(held_out, Scope(())) for held_out in (False, True))
        assert not set(taught.texts) & set(kept.texts)
        assert len(kept.texts) >= 20

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
        assert common.strip(samples[3], lines_only=True) == "The 3 th 4 thing"

    def test_a_prompt_without_common_text_has_no_second_form(self) -> None:
        prompts = [f"{i} {i + 1} {i + 2} {i + 3}" for i in range(40)]
        assert CommonText(prompts).strip(Sample(prompts[0], "x")) is None

    def test_made_up_texts_fill_every_slot(self) -> None:
        rules = grammar()
        for kind, texts in rules.items():
            for text in texts:
                assert set(re.findall(r"{(.*?)}", text)) <= set(rules), (kind, text)
        rng = random.Random(0)
        made = {from_grammar(kind, rng) for kind in WHOLE for _ in range(500)}
        assert len(made) > 1_500
        assert not any(re.search(r"[{}\\]", text) for text in made)

    @given(text=st.text(max_size=200), seed=st.integers(0, 1000))
    def test_disturbed_text_is_still_text(self, text: str, seed: int) -> None:
        rng = random.Random(seed)
        assert len(with_typos(text, rng)) <= 2 * len(text)
        assert cut(text, rng) in text
        assert bool(with_gaps(text, rng)) == bool(text)


class TestMeasures:
    def test_calibration_error_of_a_known_case(self) -> None:
        confidence = np.array([0.95] * 10 + [0.55] * 10)
        hits = np.array([True] * 9 + [False] + [True] * 3 + [False] * 7)
        assert calibration_error(confidence, hits) == pytest.approx(0.5 * 0.05 + 0.5 * 0.25)

    def test_judged_splits_doubt_from_the_rest(self) -> None:
        scores = np.log(np.array([[6.0, 2.0, 1.0, 1.0]]))
        found = judged(scores, [0], 2, temperature=1.0)
        assert found.probabilities[0].tolist() == pytest.approx([0.75, 0.25])
        assert found.doubt[0] == pytest.approx(0.2)
        assert found.confidence[0] == pytest.approx(0.6)

    def test_confusions_count_right_against_chosen(self) -> None:
        probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
        found = Judged(probabilities, np.zeros(3), np.array([0, 1, 1]))
        assert confusions(found, 2).tolist() == [[1, 0], [1, 1]]


class TestTaskFolders:
    @pytest.fixture
    def folder(self, tiny_tasks: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_tasks, tmp_path / "tasks"))

    def test_reads_names_and_choices(self, folder: Path) -> None:
        line = {"prompt": "p", "response": "r", "choices": ["r", "s"]}
        (folder / "email" / "dev.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line))
        tasks = read_tasks(folder)
        assert [task.name for task in tasks] == ["email", "sql", "sums"]
        assert tasks[0].dev == (Sample("p", "r", ("r", "s")),) * 2

    @pytest.mark.parametrize(
        ("line", "cause"),
        [
            ("{", "line 2 is not JSON"),
            ("[]", "line 2 is not a JSON object"),
            ('{"prompt": "p"}', "no text for 'response'"),
            ('{"prompt": " ", "response": "r"}', "no text for 'prompt'"),
            ('{"prompt": "p", "response": "r", "choices": [1]}', "'choices'"),
            ('{"prompt": "", "response": "r"}', "no text for 'prompt'"),
            (json.dumps({"prompt": "p " * 600_000, "response": "r"}), "1,200,000 characters"),
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
            (lambda folder: (folder / "sql" / "dev.jsonl").unlink(), "there is no"),
            (
                lambda folder: (folder / "sql" / "train.jsonl").write_text(
                    '{"prompt": "p", "response": "r"}'
                ),
                "holds 1 sample",
            ),
            (
                lambda folder: shutil.copytree(folder / "sql", folder / "sql2"),
                "sql and sql2 have .* prompts in common",
            ),
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
        for kind in ("prompts", "misspelt", "sentences of two"):
            assert card["measured"][kind]["accuracy"] > 0.9, kind
        assert card["measured"]["prompts"]["kept"] > 0.95
        assert card["measured"]["prompts"]["calibration_error"] < 0.1
        assert card["others_to_base"] > 0.9

    def test_reports_confusions_and_reliability(self, tiny_router: Path) -> None:
        rows = (tiny_router / "confusion.csv").read_text().splitlines()
        assert rows[0].split(",")[1:] == ["email", "sql", "sums"]
        assert sum(int(cell) for row in rows[1:] for cell in row.split(",")[1:]) > 100
        assert (tiny_router / "reliability.png").read_bytes()[:4] == b"\x89PNG"

    def test_same_seed_same_router(
        self, tiny_router: Path, again: tuple[Path, dict[str, Any]]
    ) -> None:
        for name in ("router.safetensors", "head.safetensors", "tokenizer.json", "reliability.png"):
            assert (again[0] / name).read_bytes() == (tiny_router / name).read_bytes()

    def test_command_line_prints_one_json_document(
        self, again: tuple[Path, dict[str, Any]]
    ) -> None:
        out, document = again
        assert document["parameters"] > 500_000
        assert router_labels(out) == tuple(document["settings"]["labels"])

    def test_takes_a_tokenizer(self, tiny_router: Path) -> None:
        by_folder = open_tokenizer(tiny_router)
        by_file = open_tokenizer(str(tiny_router / "tokenizer.json"))
        assert by_folder.get_vocab() == by_file.get_vocab()

    def test_takes_alberts_sentencepiece_model(self, tasks: list[Task], tmp_path: Path) -> None:
        import sentencepiece

        lines = (sample.prompt.lower() for task in tasks for sample in task.train)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_prefix=str(tmp_path / "spiece"),
            vocab_size=70,
            normalization_rule_name="nmt_nfkc",
            minloglevel=2,
        )
        own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
        found = open_tokenizer(tmp_path)  # the folder: it holds no tokenizer.json
        for text in ("How many are 3 cats and 5 dogs?", "Write a greeting for guest number 7"):
            assert found.encode(text, add_special_tokens=False).ids == own.encode(text.lower())

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
