"""What a router leaves to the base model: small talk, out-of-scope files, the threshold."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

from dlp_edge.errors import RouterError
from dlp_edge.models.backbone_embeddings import BackboneEmbeddings
from dlp_edge.models.confidence_calibration import conformal_threshold, least_confidence
from dlp_edge.models.evaluation import Judged
from dlp_edge.models.router_examples import LEAST_PROMPTS, ExampleMaker
from dlp_edge.models.router_tokenizer import train_tokenizer
from dlp_edge.models.tasks import Task, read_out_of_scope, read_tasks
from dlp_edge.models.training_texts.out_of_scope import OutOfScopeTexts
from dlp_edge.models.training_texts.scope import Scope
from dlp_edge.tasks.samples import Sample

pytestmark = pytest.mark.slow

GREETINGS = ("Hi", "Hello", "Hey", "hi there", "Hello!", "Good morning", "hey there", "Howdy")


def task(name: str, prompts: list[str]) -> Task:
    samples = tuple(Sample(prompt, "Yes.") for prompt in prompts)
    return Task(name, samples, samples)


class TestScope:
    def test_covers_the_same_words_in_other_letters_and_order(self) -> None:
        scope = Scope(["Good morning, how are you?", "what's the weather like"])
        assert scope.covers("how are you, good morning!")
        assert scope.covers("How are you this morning?")
        assert not scope.covers("good evening")
        assert not scope.covers("")

    def test_agrees_with_a_comparison_with_every_prompt(self) -> None:
        rng = random.Random(0)
        words = "a b c d e f g h".split()
        prompts = [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(60)]
        scope = Scope(prompts)
        for _ in range(300):
            text = set(rng.choices(words, k=rng.randint(1, 6)))
            nearest = max(len(text & set(p.split())) / len(text | set(p.split())) for p in prompts)
            assert scope.covers(" ".join(text)) == (nearest >= 0.6)

    def test_small_talk_is_taught_unless_a_skill_is_about_it(self) -> None:
        rng = random.Random(0)
        taught = Counter(OutOfScopeTexts(False, Scope(())).make(rng) for _ in range(3_000))
        assert taught["Hi"] > 0
        assert taught["Hello"] > 0
        greeting = Scope(GREETINGS)
        made = {OutOfScopeTexts(False, greeting).make(rng) for _ in range(1_000)}
        assert not made & set(GREETINGS)

    def test_texts_of_the_user_are_taught(self) -> None:
        others = OutOfScopeTexts(False, Scope(()), ["Open the pod bay doors."])
        rng = random.Random(0)
        made = Counter(others.make(rng) for _ in range(500))
        assert made["Open the pod bay doors."] > 50


class TestBalance:
    def test_rare_skills_are_shown_as_often_as_common_ones(self) -> None:
        tasks = [task("rare", ["one two"] * 3), task("common", ["three four"] * 400)]
        maker = ExampleMaker(tasks, "train", random.Random(0))
        counts = Counter(each.label for each in maker.balanced(Counter({1: LEAST_PROMPTS})))
        assert counts[0] >= LEAST_PROMPTS
        assert counts[1] == 0
        assert counts[2] > 0.1 * LEAST_PROMPTS  # other texts

    def test_short_prompts_keep_their_words(self) -> None:
        short = [f"what is the balance of account {i}" for i in range(30)]
        assert task("short", short).common.strip(Sample(short[0], "x")) is None


class TestThreshold:
    def test_is_the_kth_smallest(self) -> None:
        confidence = np.arange(1, 200) / 200
        assert conformal_threshold(confidence, 0.99) == confidence[1]
        assert conformal_threshold(confidence, 0.95) == confidence[9]

    def test_too_few_prompts_guarantee_nothing(self) -> None:
        assert conformal_threshold(np.ones(50), 0.99) is None
        few = Judged(np.array([[0.1, 0.9]]), np.zeros(1), np.array([1]))
        assert least_confidence(few) == 0.25

    def test_new_prompts_are_kept_as_often_as_promised(self) -> None:
        rng = np.random.default_rng(0)
        kept = [
            np.mean(rng.beta(2, 1, 500) >= (conformal_threshold(rng.beta(2, 1, 150), 0.95) or 0))
            for _ in range(300)
        ]
        assert 0.95 <= np.mean(kept) < 0.965

    def test_of_hard_tasks_is_lower(self) -> None:
        unsure = Judged(np.tile([[0.8, 0.2]], (200, 1)), np.full(200, 0.9), np.zeros(200, np.int64))
        assert least_confidence(unsure) == pytest.approx(0.08)


class TestOutOfScopeFile:
    def write(self, folder: Path, texts: list[str]) -> Path:
        path = folder / "foreign.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
        return path

    def test_a_fourth_is_measured_on(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, [f"text {i}" for i in range(40)] * 2)
        taught, measured = read_out_of_scope(path, [])
        assert len(taught) == 30
        assert len(measured) == 10
        assert not set(taught) & set(measured)

    def test_refuses_texts_that_are_in_scope(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, ["Book a flight", *(f"text {i}" for i in range(30))])
        with pytest.raises(RouterError, match=r"1 of the 31 texts in .* are prompts of travel"):
            read_out_of_scope(path, [task("travel", ["book a flight "])])

    def test_refuses_few_texts(self, tmp_path: Path) -> None:
        with pytest.raises(RouterError, match="holds 2 different texts"):
            read_out_of_scope(self.write(tmp_path, ["a", "b", "a"]), [])

    def test_refuses_tasks_that_differ_in_case_only(self, tmp_path: Path) -> None:
        for name in ("Email", "email"):
            (tmp_path / name).mkdir(exist_ok=True)
        if len(list(tmp_path.iterdir())) < 2:
            pytest.skip("the file system does not tell letters from capitals")
        with pytest.raises(RouterError, match="Email and email differ in case only"):
            read_tasks(tmp_path)


class TestBackboneEmbeddings:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        words = "<unk> ▁cat ▁dog ▁car ▁bus ▁x ▁12".split()
        tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        table = torch.zeros(len(words), 8)
        table[1:3, 0] = torch.tensor([5.0, 4.0])
        table[3:5, 1] = torch.tensor([5.0, 4.0])
        save_file({"model.embed_tokens.weight": table}, tmp_path / "model.safetensors")
        return tmp_path

    def test_pieces_begin_near_their_kin(self, folder: Path) -> None:
        known = BackboneEmbeddings(folder)
        tokenizer = train_tokenizer([], ["cat", "dog", "car", "bus"])
        rows = known.pieces(tokenizer, 8, 0.1)
        cat, dog, car, bus = (
            rows[tokenizer.token_to_id(f"▁{w}")] for w in "cat dog car bus".split()
        )
        assert rows.std().item() == pytest.approx(0.1)
        assert torch.dist(cat, dog) < torch.dist(cat, car)
        assert torch.dist(car, bus) < torch.dist(dog, bus)

    def test_narrow_tables_are_padded(self, folder: Path) -> None:
        rows = BackboneEmbeddings(folder).pieces(train_tokenizer([], ["cat"]), 16, 0.1)
        assert rows.shape[1] == 16

    def test_words_are_whole(self, folder: Path) -> None:
        assert BackboneEmbeddings(folder).words() == ["cat", "dog", "car", "bus"]

    def test_refuses_a_folder_without_a_table(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(RouterError, match="holds no embedding table"):
            BackboneEmbeddings(folder)
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(RouterError, match="cannot be read"):
            BackboneEmbeddings(folder)
