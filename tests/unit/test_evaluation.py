"""The parts of `dlp_edge.evaluation` that need no backbone: metrics, intervals, the store."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from dlp_edge.errors import UsageError
from dlp_edge.evaluation import EvalSettings, EvalTask, read_eval_tasks
from dlp_edge.evaluation.intervals import (
    mean_interval,
    mean_of_means,
    median_ratio,
    ratio_of_sums,
    wilson,
)
from dlp_edge.evaluation.joined import part_scores
from dlp_edge.evaluation.metrics import (
    bleu,
    bleu_counts,
    final_number,
    likeliest_is_right,
    mark,
    named_choices,
    normalise,
    picked,
)
from dlp_edge.evaluation.questions import joined_questions, task_groups
from dlp_edge.evaluation.store import Store
from dlp_edge.tasks.samples import Sample

COLOURS = ("red", "orange", "light red", "no", "none")
VALID = Sample("Is it?", "Valid", ("Valid", "Invalid"))
COLOUR = Sample("Which colour?", "red", COLOURS)
words = st.text(st.characters(codec="utf-8"), max_size=30)


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("red", "red"),
        ("  Red. ", "red"),
        ("**Red**", "red"),
        ("red\nBecause it is.", "red"),
        ("Light red, I think", "light red"),
        ("none of them", "none"),
        ("redder", None),
        ("The colour is red.", None),
        ("", None),
    ],
)
def test_the_choice_that_an_answer_makes(answer: str, choice: str | None) -> None:
    assert picked(answer, COLOURS) == choice


def test_numbers_are_no_beginnings_of_longer_numbers() -> None:
    assert picked("1", ("1", "10")) == "1"
    assert picked("1.5 metres", ("1", "10")) is None
    assert picked("10 metres", ("1", "10")) == "10"


@given(st.lists(words.filter(normalise), min_size=1, max_size=6), st.randoms())
def test_every_choice_picks_itself(choices: list[str], rng: random.Random) -> None:
    for choice in choices:
        assert picked(choice, choices) == normalise(choice)
        assert picked(choice.upper().lower(), [choice.upper().lower()]) is not None


@given(words)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_named_choices_are_whole_and_longest_first() -> None:
    assert named_choices("The colour is light red.", COLOURS) == {"light red"}
    assert named_choices("Red, not light red", COLOURS) == {"red", "light red"}
    assert named_choices("Nothing is known.", COLOURS) == set()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 1,234", 1234.0),
        ("#### 3\n#### $4.50", 4.5),
        ("####-7 apples", -7.0),
        ("#### .5", 0.5),
        ("It is 7", None),
        ("#### many", None),
    ],
)
def test_final_numbers(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_marks_of_each_kind() -> None:
    marks = mark("Invalid", VALID)
    assert (marks.score, marks.right, marks.named, marks.number) == (0.0, 0.0, 0.0, None)
    assert mark("I say it is valid", VALID).named == 1.0
    sums = Sample("How many?", "2 + 2 = 4\n#### 4")
    assert mark("It is\n#### 4.0", sums).score == 1.0
    assert mark("4", sums).score == 0.0
    free = Sample("Tell", "the cat sat")
    marks = mark("the cat ran", free)
    assert marks.right is None
    assert marks.score == marks.rouge_l == pytest.approx(2 / 3)
    # Choices that the response is none of are no multiple choice.
    assert mark("x", Sample("a", "b", ("c", "d"))).right is None


@given(words, words)
def test_marks_are_shares_and_the_response_has_full_marks(answer: str, response: str) -> None:
    sample = Sample("?", response or "x")
    marks = mark(answer, sample)
    assert all(0 <= value <= 1 for value in (marks.score, marks.exact, marks.rouge1))
    assert mark(sample.response, sample).exact == 1


def test_the_likeliest_choice() -> None:
    assert likeliest_is_right([-1.0, -2.0], VALID) == 1
    assert likeliest_is_right([-3.0, -2.0], VALID) == 0


@given(st.lists(st.tuples(*[st.text("ab cd.", max_size=20)] * 2), min_size=1, max_size=8))
def test_bleu_of_summed_counts_is_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    counts = np.sum([bleu_counts(answer, response) for answer, response in pairs], 0)
    answers, responses = zip(*pairs, strict=True)
    expected = BLEU().corpus_score(list(answers), [list(responses)]).score / 100
    assert bleu(counts) == pytest.approx(expected)


def test_wilson_by_hand() -> None:
    """Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    found = wilson(81, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20).high == pytest.approx(0.1611, abs=1e-4)


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=20), min_size=1, max_size=4))
def test_intervals_hold_their_value(groups: list[list[float]]) -> None:
    found = mean_of_means(groups)
    assert found.value == pytest.approx(np.mean([np.mean(group) for group in groups]))
    assert min(map(min, groups)) - 1e-9 <= found.low <= found.value <= found.high
    one = mean_interval(groups[0])
    assert one.low <= one.value <= one.high


def test_ratios() -> None:
    pairs = [(2.0, 1.0), (4.0, 2.0), (60.0, 10.0)]
    assert ratio_of_sums(pairs).value == pytest.approx(66 / 13)
    assert median_ratio(pairs).value == 2.0


class TestJoinedAnswers:
    free = Sample("Tell", "The cat sat. It was late.")

    def test_sentences_go_to_the_question_that_they_answer(self) -> None:
        said = ["Valid\n", "The cat sat. ", "It was late. ", "red"]
        assert part_scores(said, [VALID, self.free, COLOUR]) == (1.0, 1.0, 1.0)

    def test_order_matters(self) -> None:
        assert part_scores(["red\n", "Valid"], [VALID, COLOUR]) in ((1.0, 0.0), (0.0, 1.0))

    def test_listing_choices_earns_nothing(self) -> None:
        assert part_scores(["Valid, ", "Invalid"], [VALID]) == (0.0,)
        # Dealt to the next question, the other choice costs that one.
        assert part_scores(["Valid\n", "Invalid\n", "red"], [VALID, COLOUR]) == (1.0, 0.0)

    def test_an_answer_that_is_missing(self) -> None:
        assert part_scores(["Valid"], [VALID, COLOUR]) == (1.0, 0.0)
        assert part_scores([], [VALID, COLOUR]) == (0.0, 0.0)

    @given(st.lists(st.sampled_from(["Valid\n", "red ", "The cat sat. "]), max_size=5))
    def test_the_deal_is_the_best_of_all(self, said: list[str]) -> None:
        """Against every way to cut the sentences in two."""
        samples = [VALID, self.free]
        cuts = [(said[:i], said[i:]) for i in range(len(said) + 1)]
        best = max(
            sum(part_scores(run, [sample])[0] for run, sample in zip(cut, samples, strict=True))
            for cut in cuts
        )
        assert sum(part_scores(said, samples)) == pytest.approx(best)


def make_tasks(**counts: int) -> list[EvalTask]:
    return [
        EvalTask(name, "dev", "text", tuple(Sample(f"{name} {i}", "x") for i in range(n)), ())
        for name, n in counts.items()
    ]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(2, 3))
def test_joined_questions_use_each_sample_once(counts: list[int], size: int) -> None:
    tasks = make_tasks(**{f"t{i}": count for i, count in enumerate(counts)})
    rooms = {task.name: 10 for task in tasks}
    questions = joined_questions(tasks, size, rooms)
    assert questions == joined_questions(tasks, size, rooms)
    used = [part for question in questions for part in question.parts]
    assert len(set(used)) == len(used)
    for question in questions:
        assert len({part.task for part in question.parts}) == size
        assert question.prompt == "\n\n".join(part.sample.prompt for part in question.parts)
        assert question.room == 10 * size


@given(st.integers(2, 9), st.integers(2, 4))
def test_task_groups_hold_every_task(count: int, size: int) -> None:
    tasks = make_tasks(**{f"t{i}": 1 for i in range(count)})
    groups = task_groups(tasks, size)
    assert {name for group in groups for name in group} == {task.name for task in tasks}
    if size <= count:
        assert all(len(set(group)) == size for group in groups)


class TestStore:
    def test_finds_what_was_put(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "answers.jsonl"
        store = Store(path, "bundle")
        key = store.key("prompt", {"b": 1, "a": 2})
        assert store.get(key) is None
        store.put(key, {"text": "ä\n"})
        store.close()
        again = Store(path, "bundle")
        assert again.get(again.key("prompt", {"a": 2, "b": 1})) == {"text": "ä\n"}
        again.close()

    def test_another_bundle_prompt_or_option_finds_nothing(self, tmp_path: Path) -> None:
        one, other = (Store(tmp_path / "a", name) for name in ("one", "other"))
        keys = {one.key("p", 1), other.key("p", 1), one.key("q", 1), one.key("p", 2)}
        assert len(keys) == 4

    def test_a_line_that_was_cut_off_is_lost_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "answers.jsonl"
        for text in ("first", "second"):
            store = Store(path, "b")
            store.put(store.key(text), {"text": text})
            store.close()
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            store = Store(path, "b")
            found = store.get(store.key("second"))
            assert found is None or size == len(whole) - 1  # only the line break is missing
            store.put(store.key("third"), {"text": "third"})
            store.close()
            again = Store(path, "b")
            assert again.get(again.key("third")) == {"text": "third"}
            again.close()


class TestTasks:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name, splits in (("a", "train dev test"), ("b", "dev")):
            (tmp_path / name).mkdir()
            for split in splits.split():
                lines = [{"prompt": f"{split} {i}", "response": "x"} for i in range(9)]
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (tmp_path / name / f"{split}.jsonl").write_text(text)
        return tmp_path

    def test_test_before_dev(self, folder: Path) -> None:
        assert [(task.name, task.split) for task in read_eval_tasks(folder)] == [
            ("a", "test"),
            ("b", "dev"),
        ]
        assert [task.name for task in read_eval_tasks(folder, split="test")] == ["a"]

    def test_a_larger_limit_adds_samples(self, folder: Path) -> None:
        three, five = (read_eval_tasks(folder, limit=limit)[0].samples for limit in (3, 5))
        assert three == five[:3]
        assert five != read_eval_tasks(folder, limit=5, seed=1)[0].samples

    def test_wrong_folders(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for wrong in (tmp_path / "no", tmp_path / "empty"):
            with pytest.raises(UsageError):
                read_eval_tasks(wrong)
        with pytest.raises(UsageError):
            read_eval_tasks(folder, only=["c"])
        with pytest.raises(UsageError):
            read_eval_tasks(folder, split="other")


@pytest.mark.parametrize(
    "wrong",
    [
        {"systems": ("base", "best")},
        {"parts": ("everything",)},
        {"joined": (1,)},
        {"max_new_tokens": 0},
        {"batch": 0},
    ],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        EvalSettings(**wrong)  # type: ignore[arg-type]
