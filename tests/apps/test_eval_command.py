"""`dlp-edge eval` on the tiny bundle: a random backbone that answers nonsense, measured rightly."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Runtime, Sentence, UsageError
from dlp_edge.cli.main import main
from dlp_edge.evaluation import EvalSettings, evaluate, read_eval_tasks, write_report
from dlp_edge.evaluation.plan import PARTS, VARIANTS
from dlp_edge.evaluation.runner import WARM_TOKENS
from tests.testing.paths import ROOT

pytestmark = pytest.mark.slow

LIMIT = 3


@pytest.fixture(scope="module")
def tasks(tiny_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tasks, one of them as multiple choice, and one without an adapter."""
    folder = Path(shutil.copytree(tiny_tasks, tmp_path_factory.mktemp("eval") / "tasks"))
    (folder / "foreign").mkdir()
    (folder / "foreign" / "dev.jsonl").write_text((folder / "sql" / "dev.jsonl").read_text())
    lines = (folder / "sql" / "dev.jsonl").read_text().splitlines()
    asked = [
        {**json.loads(line), "response": "b", "choices": ["a", "b", f"c{i}"]}
        for i, line in enumerate(lines)
    ]
    (folder / "sql" / "dev.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    return folder


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle, max_context=512, threads=1) as runtime:
        yield runtime


SETTINGS = EvalSettings(parts=PARTS, multi="email", max_new_tokens=12, mixed=(2,))


@pytest.fixture(scope="module")
def document(
    runtime: Runtime, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """All parts, with `email` as the adapter of all tasks."""
    folder = tmp_path_factory.mktemp("report")
    found = evaluate(runtime, read_eval_tasks(tasks, limit=LIMIT), folder, SETTINGS)
    write_report(found, folder)
    return {**found, "folder": folder}


def test_every_system_of_every_task(document: dict[str, Any]) -> None:
    systems = {task["name"]: task["systems"] for task in document["tasks"]}
    assert set(systems) == {"email", "foreign", "sql", "sums"}
    for task, own in systems.items():
        assert own["base"]["questions"] == LIMIT
        assert (own["single"] is None) == (task == "foreign")
        assert own["base"]["time_ratio"]["value"] == 1
    assert "likelihood" in systems["sql"]["dlp"]["means"]
    assert "bleu" in systems["sums"]["dlp"]["means"]


def test_the_parts(document: dict[str, Any]) -> None:
    assert set(document["sweep"]) == {"dlp", *VARIANTS}
    assert document["joined"]["2"]["questions"] == LIMIT * 3 // 2
    assert set(document["joined"]["2"]["systems"]) >= {"base", "multi", "dlp", "kv recompute"}
    assert [found["count"] for found in document["mixed"]] == [2]
    assert document["bare"]["all"]["questions"] > 0
    assert document["losses"]["questions"] == LIMIT * 3
    assert (
        sum(sum(own.values()) for own in document["losses"]["by_task"].values())
        == (document["losses"]["lost"])
    )


def test_the_report_can_be_read_alone(document: dict[str, Any]) -> None:
    folder = document["folder"]
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 2
    assert "src=" not in html.replace('src="data:', "")
    text = (folder / "report.md").read_text(encoding="utf-8")
    for heading in ("Averages over tasks", "Composite-2", "Routing rules", "Where dlp loses"):
        assert f"# {heading}" in text
        assert heading in html
    for name in ("scores.png", "time.png"):
        assert name in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    known = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert known["averages"] == document["averages"]


def test_single_answers_are_the_pinned_adapters(runtime: Runtime, document: dict[str, Any]) -> None:
    records = [
        json.loads(line)["record"]
        for line in (document["folder"] / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for record in records:
        if "text" in record:
            assert len(record["clock"]) == record["new_tokens"]
            assert record["clock"] == sorted(record["clock"])
            assert record["seconds"] >= record["clock"][-1] - 1e-4
    # Routing never picks the adapter of all tasks.
    fusions = [fusion for record in records for _, fusion in record.get("sentences", ())]
    assert any("email" in fusion for fusion in fusions)  # pinned
    routed = [d for record in records for d in record.get("decisions", ())]
    assert routed
    assert all("email" not in decision["weights"] for decision in routed)


def test_a_second_evaluation_asks_nothing_again(
    runtime: Runtime,
    document: dict[str, Any],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the first one was killed half-way, in the middle of a line."""
    lines = (document["folder"] / "answers.jsonl").read_bytes().splitlines(keepends=True)
    half = lines[: len(lines) // 2]
    (tmp_path / "answers.jsonl").write_bytes(b"".join(half) + lines[len(half)][:20])
    asked: list[str] = []
    stream, score = runtime.stream, runtime.score

    def count_stream(prompt: str, **options: Any) -> Any:
        if options["max_new_tokens"] != WARM_TOKENS:
            asked.append(prompt)
        return stream(prompt, **options)

    def count_score(prompt: str, *texts: Any, **options: Any) -> Any:
        asked.append(prompt)
        return score(prompt, *texts, **options)

    monkeypatch.setattr(runtime, "stream", count_stream)
    monkeypatch.setattr(runtime, "score", count_score)
    samples = read_eval_tasks(tasks, limit=LIMIT)
    again = evaluate(runtime, samples, document["folder"], SETTINGS)
    assert asked == []
    assert again["averages"] == document["averages"]
    resumed = evaluate(runtime, samples, tmp_path, SETTINGS)
    assert len(asked) == len(lines) - len(half)
    assert (
        resumed["tasks"][0]["systems"]["dlp"]["score"]
        == (document["tasks"][0]["systems"]["dlp"]["score"])
    )


def test_batches_score_the_same(
    runtime: Runtime, document: dict[str, Any], tasks: Path, tmp_path: Path
) -> None:
    settings = EvalSettings(parts=("tasks",), multi="email", max_new_tokens=12, batch=4)
    found = evaluate(runtime, read_eval_tasks(tasks, limit=LIMIT), tmp_path, settings)
    for one, other in zip(found["tasks"], document["tasks"], strict=True):
        for system, own in one["systems"].items():
            if own is not None:
                assert own["score"] == other["systems"][system]["score"]
                assert own["time_ratio"] is None


def test_no_task_of_the_bundle(runtime: Runtime, tasks: Path, tmp_path: Path) -> None:
    foreign = read_eval_tasks(tasks, only=["foreign"])
    with pytest.raises(UsageError, match="no task has an adapter"):
        evaluate(runtime, foreign, tmp_path / "no")
    with pytest.raises(UsageError, match="no adapter 'nobody'"):
        evaluate(runtime, read_eval_tasks(tasks), tmp_path / "no", EvalSettings(multi="nobody"))
    assert not (tmp_path / "no").exists()


def test_the_command(
    tiny_bundle: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    words = ["eval", str(tiny_bundle), str(tasks), "--limit", "2", "-o", str(out), "--p", "0.9"]
    words += ["--max-new-tokens", "6", "--only", "sql,foreign", "--parts", "tasks,likelihood"]
    assert main(words) == 0
    printed, remarks = capsys.readouterr()
    assert "dlp - single" in printed
    assert "foreign" in remarks
    assert main([*words, "--json", "--quiet"]) == 0
    printed, remarks = capsys.readouterr()
    assert remarks == ""
    found = json.loads(printed)
    assert found["settings"]["routing"] == {"p": 0.9}
    assert [task["name"] for task in found["tasks"]] == ["foreign", "sql"]


def test_the_case_study_picture(runtime: Runtime) -> None:
    """Sentences under one adapter, several and none; text that matplotlib could take for maths."""
    path = ROOT / "recipes" / "case_study.py"
    spec = importlib.util.spec_from_file_location("case_study", path)
    assert spec
    assert spec.loader
    case_study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(case_study)
    reply = runtime.generate("What?", adapters={}, max_new_tokens=2)
    sentences = (
        Sentence("One costs $5 and two $\\frac{1}$. ", {"sums": 0.6, "sql": 0.4}, 0.9),
        Sentence("word " * 60, {"email": 1.0}, None),
        Sentence("Base.", {}, 0.1),
    )
    figure = case_study.draw("What?\nAnd?", replace(reply, sentences=sentences), ["sums", "sql"])
    figure.savefig(io.BytesIO(), format="png")
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert "sums 60.0 %\nsql 40.0 %" in shown
    assert "base 100.0 %" in shown


def test_comparing_with_another_evaluation(
    tiny_bundle: Path, tasks: Path, tmp_path: Path, document: dict[str, Any]
) -> None:
    other = document["folder"] / "results.json"
    words = ["eval", str(tiny_bundle), str(tasks), "-o", str(tmp_path), "--limit", "1", "--quiet"]
    words += ["--only", "sums", "--max-new-tokens", "4", "--parts", "tasks"]
    assert main([*words, "--beside", f"other={other}"]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| other, all" in text
    broken = tmp_path / "broken.json"
    broken.write_text('{"tasks": 3}')
    for wrong in ("nothing", f"x={tmp_path / 'no.json'}", f"x={broken}"):
        assert main([*words, "--beside", wrong]) == 2


@pytest.mark.parametrize(
    "extra",
    [
        ["--limit", "0"],
        ["--joined", "two"],
        ["--parts", "everything"],
        ["--systems", "best"],
        ["--only", "nobody"],
        ["--inertia", "1"],
        ["--split", "none"],
    ],
)
def test_wrong_command_lines(
    tiny_bundle: Path, tasks: Path, tmp_path: Path, extra: list[str]
) -> None:
    out = tmp_path / "out"
    assert main(["eval", str(tiny_bundle), str(tasks), "-o", str(out), "--quiet", *extra]) == 2
    assert not out.exists()


def test_a_missing_package_names_the_extra(
    tiny_bundle: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.startswith("dlp_edge.evaluation")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert main(["eval", str(tiny_bundle), str(tasks), "-o", str(tmp_path / "out")]) == 4
    assert "dlp-edge[eval]" in capsys.readouterr().err
