"""Careless use of the command line and of the API: one line says what is wrong, and what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import AdapterError, Runtime, UsageError
from dlp_edge.cli.main import main
from dlp_edge.tasks.samples import read_samples

BOM = b"\xef\xbb\xbf"


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dlp_edge.cli.main", *words]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("verb", ["run", "route", "inspect"])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_full_disk_is_one_line_and_exit_code_4(
    tiny_bundle: Path, verb: str, as_json: bool
) -> None:
    words = [verb, str(tiny_bundle), *([] if verb == "inspect" else ["Hello"]), "--quiet"]
    with Path("/dev/full").open("w", encoding="ascii") as full:
        done = run(*words, *(["--json"] if as_json else []), stdout=full)
    assert done.returncode == 4
    assert done.stderr == (
        "error: cannot write (No space left on device). Free some space, or write elsewhere.\n"
    )


def test_texts_with_a_byte_order_mark(tiny_bundle: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_bytes(
        BOM + b'{"prompt": "a", "response": "b"}\r\n{"prompt": "c", "response": "d"}'
    )
    assert [sample.prompt for sample in read_samples(samples)] == ["a", "c"]
    schema = tmp_path / "schema.json"
    schema.write_bytes(BOM + b'{"enum": ["yes"]}')
    options = ["--adapters", "", "--json", "--json-schema", str(schema)]
    done = run("run", str(tiny_bundle), "-", *options, input="\ufeffHi", stdout=subprocess.PIPE)
    bare = run("run", str(tiny_bundle), "Hi", *options, stdout=subprocess.PIPE)
    found, expected = json.loads(done.stdout), json.loads(bare.stdout)
    assert (found["text"], found["usage"]) == (expected["text"], expected["usage"])
    turns = run(
        *("chat", str(tiny_bundle), "--adapters", "", "--max-new-tokens", "2", "--json"),
        input="\ufeffHi\n",
        stdout=subprocess.PIPE,
    )
    assert json.loads(turns.stdout)["turns"][0]["prompt"] == "Hi"


@pytest.mark.parametrize(
    ("name", "cause", "remedy"),
    [
        ("model.gguf", "is a backbone, not a bundle", "dlp-edge export --backbone"),
        ("model", "is a backbone, not a bundle", "dlp-edge export --backbone"),
        ("adapter", "is a PEFT adapter, not a bundle", "dlp-edge add BUNDLE NAME="),
        ("empty", "not a complete bundle", "Export it again"),
        ("text.txt", "there is no bundle", "Check the path"),
        ("nothing", "there is no bundle", "Check the path"),
    ],
)
def test_what_is_no_bundle_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, cause: str, remedy: str
) -> None:
    for folder, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "text.txt").write_text("")
    assert main(["run", str(tmp_path / name), "Hello"]) == 3
    error = capsys.readouterr().err
    assert cause in error
    assert remedy in error


@pytest.mark.parametrize("name", ["auto", "base", "Base", "AUTO"])
def test_names_that_mean_something_else_are_refused(
    bundle_copy: Path, parrot: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with (
        Runtime(bundle_copy) as runtime,
        pytest.raises(AdapterError, match="routing and the base model"),
    ):
        runtime.add_adapter(name, parrot)
    assert main(["add", str(bundle_copy), f"{name}={parrot}"]) == 3
    assert "not a valid adapter name" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_remarked(
    bundle_copy: Path, parrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(parrot, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "meta-llama/Llama-3.2-1B"
    (other / "adapter_config.json").write_text(json.dumps(config))
    remark = "adapter parrot was trained on meta-llama/Llama-3.2-1B, this backbone is called"
    with Runtime(bundle_copy) as runtime:
        with pytest.warns(UserWarning, match=remark):
            runtime.add_adapter("parrot", other)
        runtime.remove_adapter("parrot")
    assert main(["add", str(bundle_copy), f"parrot={other}"]) == 0
    assert f"note: {remark}" in capsys.readouterr().err
    assert main(["remove", str(bundle_copy), "parrot", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["add", str(bundle_copy), f"parrot={other}", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["remarks"][0].startswith(remark)
    assert err == ""


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"max_tokens": -1}, "Write max_new_tokens"),
        ({"temprature": 1.0}, "Write temperature"),
        ({"adapter": "sql"}, "Write adapters"),
        ({"xyz": 1}, "Use: adapters, "),
        ({"max_new_tokens": -1}, "Choose 1 or more"),
    ],
)
def test_options_by_other_names(tiny_bundle: Path, options: Any, remedy: str) -> None:
    with Runtime(tiny_bundle) as runtime, pytest.raises(UsageError, match=remedy):
        runtime.generate("Hello", **options)


def test_counting_what_is_no_text(tiny_bundle: Path) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    with Runtime(tiny_bundle) as runtime, pytest.raises(UsageError, match="the text is list"):
        runtime.count_tokens(messages)


def test_a_pydantic_class_is_a_schema(tiny_bundle: Path) -> None:
    pydantic = pytest.importorskip("pydantic")
    pytest.importorskip("llguidance")
    model = pydantic.create_model("Answer", __config__={"extra": "forbid"}, a=(bool, ...))
    with Runtime(tiny_bundle) as runtime:
        text = runtime.generate("Hello", adapters={}, json_schema=model).text
        assert model.model_validate_json(text).a in (True, False)
        with pytest.raises(UsageError, match="no schema that can be followed"):
            runtime.generate("Hello", adapters={}, json_schema=int)
