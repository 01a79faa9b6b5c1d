"""The command line: output, JSON, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlp_edge import Runtime
from dlp_edge.cli.main import build_parser, main
from dlp_edge.cli.options import parse_adapters
from dlp_edge.cli.verbs.completion import SHELLS
from dlp_edge.errors import UsageError

PROGRESS = r" {0,2}\d+%  .+"  # a step of it, off a terminal


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dlp_edge.cli.main", *arguments], capture_output=True, text=True
    )


def test_run_shows_sentences_with_their_fusion(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adapters", "sums,sql=0.5", "--max-new-tokens", "8"]
    assert main(["run", str(tiny_bundle), "Hello", "--no-plain", *options]) == 0
    out, err = capsys.readouterr()
    assert "sums 1.00 + sql 0.50" in out
    assert "tokens" in err
    assert "\x1b" not in out + err


def test_a_pipe_gets_the_text_alone(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(tiny_bundle), "Hello", "--adapters", "sums", "--max-new-tokens", "12"]
    assert main([*command, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    for options in ([], ["--plain"]):
        assert main([*command, *options, "--quiet"]) == 0
        assert capsys.readouterr() == (text + "\n", "")


def test_a_system_message(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(tiny_bundle), "Hello", "--adapters", "", "--max-new-tokens", "4"]
    assert main([*command, "--json", "--system", "Be brief."]) == 0
    found = json.loads(capsys.readouterr().out)
    with Runtime(tiny_bundle) as runtime:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
        ]
        expected = runtime.generate(messages, adapters={}, max_new_tokens=4)
    assert found["text"] == expected.text
    assert found["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_run_json(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(tiny_bundle), "Hello", "--max-new-tokens", "8", "--min-confidence", "0"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["usage"]["completion_tokens"] == 8
    assert document["sentences"][0]["fusion"]
    assert document["rates"]["decode_tokens_per_second"] > 0


def test_run_json_schema(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    options = ["--json-schema", str(schema), "--min-p", "0.1", "--repetition-penalty", "1.1"]
    assert main(["run", str(tiny_bundle), "Hello", "--json", "--adapters", "", *options]) == 0
    assert json.loads(json.loads(capsys.readouterr().out)["text"]) in ("yes", "no")
    missing = ["--json-schema", str(tmp_path / "missing.json")]
    assert main(["run", str(tiny_bundle), "Hello", *missing]) == 2


def test_route(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", str(tiny_bundle), "Select the name of row 3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["selected"] == ["sql"]
    assert main(["route", str(tiny_bundle), "Select it", "--min-confidence", "1"]) == 0
    assert "abstains" in capsys.readouterr().err


def test_inspect(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle)]) == 0
    printed = capsys.readouterr().out
    assert "sql" in printed
    assert main(["inspect", str(tiny_bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert f"kernels    {document['kernels']}" in printed
    assert document["manifest"]["backbone"]["quantisation"] == "fp32"


def test_export(
    tiny_backbone: Path,
    tiny_adapters: dict[str, Path],
    tiny_router: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapters = [
        word for name, path in tiny_adapters.items() for word in ("--adapter", f"{name}={path}")
    ]
    command = ["export", "--backbone", str(tiny_backbone), *adapters]
    command += ["--router", str(tiny_router), "-o", str(tmp_path / "b")]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["quantisation"] == "int8"
    steps = err.splitlines()
    assert steps[0] == "  0%  reading the backbone"
    assert steps[-1] == "100%  done"
    assert all(re.fullmatch(PROGRESS, step) for step in steps)
    assert main([*command, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert re.match("verdict +good", out.splitlines()[-1])
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["nothing"], 2),
        (["run"], 2),
        (["run", "BUNDLE", "x", "--nothing"], 2),
        (["run", "BUNDLE", ""], 2),
        (["run", "BUNDLE", "x", "--adapters", "nothing"], 2),
        (["run", "BUNDLE", "x", "--adapters", "sums=much"], 2),
        (["run", "BUNDLE", "x" * 600], 2),
        (["run", "BUNDLE", "x", "--max-new-tokens", "0"], 2),
        (["run", "BUNDLE", "x", "--seed", "-1"], 2),
        (["route", "BUNDLE", ""], 2),
        (["inspect", "x" * 5000], 3),
        (["run", "NOWHERE", "x"], 3),
        (["inspect", "NOWHERE"], 3),
        (["route", "NOWHERE", "x"], 3),
        (["run", "BUNDLE", "x", "--device", "cuda"], 4),
        (["export", "--backbone", "NOWHERE/x/y", "-o", "NOWHERE"], 3),
        (["export", "--backbone", "x", "-o", "x", "--adapter", "a"], 2),
        (["export", "--backbone", "x", "-o", "x", "--adapter", "a=b", "--adapter", "a=c"], 2),
        (["train-router", "NOWHERE", "-o", "NOWHERE2"], 3),
    ],
)
def test_exit_codes_one_line_and_no_traceback(
    tiny_bundle: Path, tmp_path: Path, arguments: list[str], code: int
) -> None:
    places = {"BUNDLE": str(tiny_bundle), "NOWHERE": str(tmp_path / "no")}
    words = [places.get(word, word.replace("NOWHERE", str(tmp_path / "no"))) for word in arguments]
    done = run(*words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    [error] = [line for line in done.stderr.splitlines() if not re.fullmatch(PROGRESS, line)]
    assert error.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_that_is_not_utf8(tiny_bundle: Path) -> None:
    """As on Windows, where a redirected stdout is cp1252."""
    command = ["run", str(tiny_bundle), "x", "--max-new-tokens", "4", "--no-plain"]
    done = subprocess.run(
        [sys.executable, "-m", "dlp_edge.cli.main", *command],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0
    assert "│" in done.stdout.decode()


def test_everything_forbidden(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", str(tiny_bundle), "x", "--forbid", "sums,sql,email"]) == 0
    assert "abstains" in capsys.readouterr().err


def test_errors_as_json(tmp_path: Path) -> None:
    done = run("inspect", str(tmp_path / "no"), "--json")
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "BundleError"
    assert error["exit_code"] == done.returncode == 3
    assert error["cause"]
    assert error["remedy"]


def test_a_wrong_command_line_as_json() -> None:
    done = run("run", "--json")
    error = json.loads(done.stdout)["error"]
    assert (error["type"], error["exit_code"], done.returncode) == ("UsageError", 2, 2)
    assert "bundle" in error["cause"]


def verbs() -> dict[str, argparse.ArgumentParser]:
    [choices] = [
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(choices)


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_has_the_same_manners(verb: str) -> None:
    options = {word for action in verbs()[verb]._actions for word in action.option_strings}
    assert {"--json", "--quiet", "--help"} <= options


def test_quiet(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["run", str(tiny_bundle), "Hello", "--max-new-tokens", "4"],
        ["route", str(tiny_bundle), "Select it", "--min-confidence", "1"],
    ):
        assert main(words) == 0
        loud = capsys.readouterr()
        assert loud.err
        assert main([*words, "--quiet"]) == 0
        assert capsys.readouterr() == (loud.out, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for verb, parser in verbs().items():
        assert verb in script
        assert parser.prog == f"dlp-edge {verb}"
    assert "max-new-tokens" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path: Path) -> None:
    def complete(*words: str) -> set[str]:
        array = " ".join(map(shlex.quote, words))
        code = (
            f"source {shlex.quote(str(tmp_path / 'script'))}\n"
            f"COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}\n"
            f"function=$(complete -p dlp-edge | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
            'COMP_LINE="${COMP_WORDS[*]}"; $function; printf "%s\\n" "${COMPREPLY[@]}"\n'
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
        return {word.strip() for word in done.stdout.splitlines()}

    (tmp_path / "script").write_text(run("completion", "bash").stdout)
    assert set(verbs()) <= complete("dlp-edge", "")
    assert complete("dlp-edge", "ins") == {"inspect"}
    assert {"--kv", "--json"} <= complete("dlp-edge", "run", "--")


def test_input_that_is_no_utf8(tiny_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dlp_edge.cli.main", "run", str(tiny_bundle), "-"],
        input=b"\xff",
        capture_output=True,
    )
    assert done.returncode == 2
    assert b"not valid Unicode" in done.stderr


def test_adapters_argument() -> None:
    assert parse_adapters("a, b=0.3") == {"a": 1.0, "b": 0.3}
    assert parse_adapters("") == {}
    with pytest.raises(UsageError):
        parse_adapters("a=x")
