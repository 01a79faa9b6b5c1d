"""The recipes: task files without overlap, adapters whose training survives an interruption."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.testing.paths import ROOT

RECIPES = ROOT / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tasks = recipe("tasks")


@given(st.lists(st.tuples(st.text(max_size=6), st.integers(0, 9)), max_size=60), st.integers(0, 3))
def test_no_prompt_or_problem_is_in_two_splits(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], seed: int
) -> None:
    samples = [tasks.Sample(prompt, str(key), (), str(key)) for prompt, key in rows]
    folder = tmp_path_factory.mktemp("task")
    sizes = {"train": 4, "dev": 2, "test": 2}
    written = tasks.write(folder, samples, sizes, seed)
    lines = {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]
        for split in sizes
    }
    everything = [line for split in lines.values() for line in split]
    assert {split: len(found) for split, found in lines.items()} == written
    assert len({tasks._plain(line["prompt"]) for line in everything}) == len(everything)
    assert len({line["response"] for line in everything}) == len(everything)  # the problem here


def archive_of(folder: Path, name: str, task: dict[str, Any]) -> Path:
    path = folder / "archive.tar.gz"
    content = json.dumps(task).encode()
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(f"{tasks.HOME}{name}/sub/task.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return path


def test_big_bench_task_becomes_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {
        "task_prefix": "Count. ",
        "append_choices_to_input": True,
        "examples": [
            {"input": " a b ", "target_scores": {"2": 1, "two": 1, "3": 0}},
            {"input": "a", "target": ["one", "1"]},
            {"input": "x" * 99, "target": "too long"},
        ],
    }
    found = archive_of(tmp_path, "winowhy", task)
    monkeypatch.setattr(tasks, "archive", lambda: found)
    ((name, samples),) = tasks.big_bench(["winowhy"], longest=60)
    assert name == "winowhy"
    assert [sample.response for sample in samples] == ["2", "one"]
    assert sorted(samples[0].choices) == ["2", "3"]  # "two" is right as well
    assert samples[0].prompt.startswith("Count.\na b\nchoice: ")
    assert samples[1].prompt == "Count.\na"
    assert "choices" not in json.loads(samples[1].line())


def test_an_archive_of_another_content_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"not the archive")
    monkeypatch.setenv("DLP_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "_address", other.as_uri)
    with pytest.raises(SystemExit, match="SHA-256"):
        tasks.archive()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_one_task_alone_is_trained_without_pairs(tmp_path: Path, tiny_backbone: Path) -> None:
    samples = [{"prompt": f"{i} + 1", "response": str(i + 1)} for i in range(2)]
    (tmp_path / "tasks" / "sums").mkdir(parents=True)
    (tmp_path / "tasks" / "sums" / "train.jsonl").write_text("\n".join(map(json.dumps, samples)))
    script = [sys.executable, str(RECIPES / "train_adapters.py"), str(tmp_path / "tasks")]
    script += [str(tmp_path / "out"), "--backbone", str(tiny_backbone)]
    done = subprocess.run([*script, "--epochs", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sums: 2 examples" in done.stderr
    done = subprocess.run([*script, "--only", "chess"], capture_output=True, text=True)
    assert (done.returncode, "no NAME/train.jsonl for chess" in done.stderr) == (1, True)
