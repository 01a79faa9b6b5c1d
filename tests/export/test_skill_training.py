"""Training a skill: what the loss covers, what the report says, and interruptions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from dlp_edge import Runtime
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.cli.main import main
from dlp_edge.errors import RouterError
from dlp_edge.models import skill_training
from dlp_edge.models.skill_examples import (
    JOINS,
    PromptFormat,
    examples_for_all,
    in_batches,
    pair,
    single,
    skill_examples,
)
from dlp_edge.models.skill_training import SkillRecipe, train_skill
from dlp_edge.tasks.samples import Sample
from dlp_edge.untrusted.chat_template import ChatTemplate

pytestmark = pytest.mark.slow

SUMS = [Sample(f"{i} + 1", str(i + 1)) for i in range(6)]
NAMES = [Sample(f"name {i}", "Leo") for i in range(6)]


@pytest.fixture
def form(tiny_backbone: Path, tiny_bundle: Path) -> PromptFormat:
    tokenizer = Tokenizer.from_file(str(tiny_backbone / "tokenizer.json"))
    template = open_bundle(tiny_bundle).manifest.chat_template
    return PromptFormat(tokenizer, ChatTemplate(template), "", "<|end|>")


def learnt(form: PromptFormat, ids: list[int], learn: list[bool]) -> str:
    chosen = [id_ for id_, wanted in zip(ids, learn, strict=True) if wanted]
    text: str = form.tokenizer.decode(chosen, skip_special_tokens=False)
    return text


def test_what_is_learnt_of_an_example(form: PromptFormat) -> None:
    example = single(form, Sample("one", "two"))
    whole = form.tokenizer.decode(example.ids, skip_special_tokens=False)
    assert whole == "<|user|>one<|end|><|assistant|>two<|end|>"
    assert learnt(form, example.ids, example.learn) == "two<|end|>"


@pytest.mark.parametrize(
    ("own", "expected"),
    [(0, "abcde\nv"), (1, "abcwxyz<|end|>"), (None, "abcde\nvwxyz<|end|>")],
)
def test_what_is_learnt_of_a_pair(form: PromptFormat, own: int | None, expected: str) -> None:
    """The tiny tokenizer has a token a byte."""
    example = pair(form, Sample("1", "abcde"), Sample("2", "vwxyz"), own, " ")
    assert learnt(form, example.ids, example.learn) == expected


def test_a_skill_alone_has_no_pairs(form: PromptFormat) -> None:
    rng = random.Random(0)
    assert len(skill_examples(form, SUMS, {}, 2, rng)) == 6
    assert len(skill_examples(form, SUMS, {"names": NAMES}, 2, rng)) == 9
    assert len(skill_examples(form, SUMS, {"names": NAMES}, 0, rng)) == 6
    assert len(examples_for_all(form, {"sums": SUMS, "names": NAMES}, 3, rng)) == 16
    assert all(JOINS)


def test_batches_hold_every_example_once_within_their_size(form: PromptFormat) -> None:
    examples = [single(form, sample) for sample in (*SUMS, *NAMES)]
    found = in_batches(examples, 60, random.Random(1))
    read = [id(example) for batch in found for example in batch]
    assert sorted(read) == sorted(map(id, examples))
    assert max(len(batch) * max(len(e.ids) for e in batch) for batch in found) <= 60


def test_interrupted_training_ends_as_if_it_had_not_been(
    tmp_path: Path, tiny_backbone: Path, form: PromptFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skill_training, "CHECKPOINT_EVERY", 2)
    recipe = SkillRecipe(rank=2, epochs=4, tokens=100)
    examples = skill_examples(form, SUMS, {"names": NAMES}, 2, random.Random(0))

    def train(out: Path) -> skill_training.SkillReport:
        return train_skill(tiny_backbone, examples, [], out / "sums", recipe, "tiny")

    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    report = train(tmp_path / "whole")
    steps, loss = [0], skill_training.batch_loss

    def dies_at_the_sixth(*arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] == 6:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(skill_training, "batch_loss", dies_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    assert not (tmp_path / "cut" / "sums").exists()
    train(tmp_path / "cut")
    assert report.steps > 6
    assert steps[0] == report.steps + 2  # of the fifth and sixth, twice
    whole, cut = (
        load_file(tmp_path / out / "sums" / "adapter_model.safetensors") for out in ("whole", "cut")
    )
    for key, value in whole.items():
        assert (value == cut[key]).all(), key
    assert any((value != 0).any() for key, value in whole.items() if "lora_B" in key)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["sums"]


def test_the_report_measures_what_was_held_out(
    tmp_path: Path, tiny_backbone: Path, form: PromptFormat
) -> None:
    """An adapter that has learnt one answer by heart predicts it, and says so."""
    examples = [single(form, Sample("who", "Leo"))] * 4
    recipe = SkillRecipe(rank=4, epochs=60, learning_rate=2e-2, targets=("q_proj", "v_proj"))
    report = train_skill(tiny_backbone, examples, examples[:1], tmp_path / "leo", recipe, "tiny")
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss / 2
    assert report.after.tokens >= report.before.tokens
    assert (report.examples, report.held_out, report.epochs, report.steps) == (4, 1, 60, 60)
    with pytest.raises(RouterError, match="no example has 2 tokens"):
        train_skill(tiny_backbone, examples, [], tmp_path / "no", SkillRecipe(longest=2), "tiny")


def test_few_examples_are_read_more_often() -> None:
    from dlp_edge.models.skill_examples import Example

    few, many = [Example([1] * 50, [True] * 50)] * 50, [Example([1] * 50, [True] * 50)] * 5000
    counts = [
        skill_training._plan(examples, SkillRecipe(), random.Random(0))[0]
        for examples in (few, many)
    ]
    assert counts == [skill_training.MOST_EPOCHS, 2]


def test_from_examples_to_an_answer(
    tmp_path: Path,
    tiny_backbone: Path,
    tiny_bundle: Path,
    bundle_copy: Path,
    tiny_tasks: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    examples = tmp_path / "chess.jsonl"
    lines = [json.dumps({"prompt": f"Best move {i}?", "response": f"e{i}"}) for i in range(20)]
    examples.write_text("\n".join(lines), encoding="utf-8-sig")
    adapter = tmp_path / "chess"
    command = ["train-skill", str(examples), "--backbone", str(tiny_backbone), "-o", str(adapter)]
    command += ["--bundle", str(bundle_copy), "--beside", str(tiny_tasks), "--epochs", "2"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["held_out"], report["examples"]) == (2, 24)
    assert main(["add", str(bundle_copy), f"chess={adapter}", "--examples", str(examples)]) == 0
    assert "was trained on" not in capsys.readouterr().err
    with Runtime(bundle_copy) as runtime:
        assert runtime.generate("Best move 3?", adapters="chess", max_new_tokens=3).text
    assert main([*command, "--quiet"]) == 0  # an adapter may be trained again
    assert "answers right" in capsys.readouterr().out
    assert main([*command[:-4], "--beside", str(tmp_path / "no")]) == 2
    assert main([*command[:5], str(tmp_path)]) == 2
