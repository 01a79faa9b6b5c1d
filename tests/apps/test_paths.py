"""Paths and texts as other systems write them: names, lengths, encodings, ends of lines."""

from __future__ import annotations

import codecs
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path, PureWindowsPath

import pytest

from dlp_edge import AdapterError, ResourceError, Runtime, UsageError
from dlp_edge.atomic.staging import _beside
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.manifest import check_adapter_name
from dlp_edge.bundle.peft_reader import CONFIG, read_adapters
from dlp_edge.cli.main import main
from dlp_edge.hub.fetch import fetch_bundle
from dlp_edge.tasks.samples import read_samples
from tests.testing.hub_server import HubServer

LONG = "/".join(["a folder of a customer in the far north"] * 8)  # > 260 characters, Windows' limit
UMLAUT = "Bündel für Ännchen"
FOLDERS = {
    "spaces": " my  bundles ",
    "composed": unicodedata.normalize("NFC", UMLAUT),
    "decomposed": unicodedata.normalize("NFD", UMLAUT),
    "other scripts": "数据 данные 🦙",
    "signs": "a'b&c;d$(e)%f%#g=h,i[0-9]*?",
    "long": LONG,
    "of Windows": r"\\?\C:\Users\Jo\AppData",  # here a name, whose signs must survive
    "a device": "CON/nul.txt/aux. ",
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow the names")


@linux
@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_everything_works_in_a_folder_of_any_name(
    folder: str,
    bundle_copy: Path,
    parrot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "homes" / folder
    home.mkdir(parents=True)
    bundle, adapter = home / "my bundle", home / "my parrot"
    bundle_copy.rename(bundle)
    shutil.copytree(parrot, adapter)
    samples = home / "my samples.jsonl"
    samples.write_text('{"prompt": "Repeat: é", "response": "é"}\n' * 10, encoding="utf-8")
    monkeypatch.setenv("DLP_EDGE_CACHE", str(home / "cache"))
    added = ["add", str(bundle), f"parrot={adapter}", "--examples", str(samples)]
    for line in (
        added,
        ["verify", str(bundle)],
        ["inspect", str(bundle)],
        ["run", str(bundle), "Hello", "--max-new-tokens", "3"],
        ["remove", str(bundle), "parrot"],
    ):
        assert main([*line, "--json"]) == 0, capsys.readouterr().out
    with Runtime(bundle, threads=1) as runtime:
        chat = runtime.session()
        chat.send("Hello", max_new_tokens=3)
        chat.save(home / "my chat.json")
        runtime.load_session(home / "my chat.json")
    server = HubServer()
    server.repositories["some/one"] = {path.name: path.read_bytes() for path in bundle.iterdir()}
    fetch_bundle(f"{server.url}/some/one/resolve/main", home / "fetched")
    server.close()
    assert open_bundle(home / "fetched").manifest == open_bundle(bundle).manifest


@pytest.mark.parametrize(
    "prefix", ["C:\\", "\\\\?\\C:\\", "\\\\server\\share\\", "\\\\?\\UNC\\s\\x\\"]
)
def test_names_beside_a_target_keep_a_windows_prefix(prefix: str) -> None:
    """Long paths need \\\\?\\, below which Windows interprets nothing."""
    beside = _beside(PureWindowsPath(prefix + "apps\\bundle"), "staging")  # type: ignore[arg-type]
    assert str(beside) == prefix + "apps\\.bundle.staging"


TOO_LONG = "x" * 300
LINES = {
    "run": ["run", TOO_LONG, "Hello"],
    "inspect": ["inspect", TOO_LONG],
    "pull": ["pull", "http://127.0.0.1:9/x", "-o", TOO_LONG],
    "add": ["add", "BUNDLE", f"x={TOO_LONG}"],
    "examples": ["add", "BUNDLE", "x=PARROT", "--examples", TOO_LONG],
    "train-router": ["train-router", TOO_LONG, "-o", "out"],
    "eval": ["eval", "BUNDLE", TOO_LONG, "-o", "out"],
    "export": ["export", "--backbone", TOO_LONG, "-o", "out"],
    "sign": ["sign", "BUNDLE", "--new-key", TOO_LONG],
}


NEED_TORCH = ("train-router", "export")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=pytest.mark.slow if line[0] in NEED_TORCH else [], id=name)
        for name, line in LINES.items()
    ],
)
def test_a_name_that_the_system_does_not_allow(
    line: list[str], tiny_bundle: Path, parrot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w.replace("BUNDLE", str(tiny_bundle)).replace("PARROT", str(parrot)) for w in line]
    assert main(words) in (2, 3)
    error = capsys.readouterr().err
    assert TOO_LONG in error
    assert "internal" not in error


@pytest.mark.parametrize("name", [TOO_LONG, "a\0b"], ids=["too long", "a zero"])
def test_outputs_that_the_system_does_not_allow(
    name: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        fetch_bundle("http://127.0.0.1:9/x", tmp_path / name)
    with Runtime(tiny_bundle, threads=1) as runtime, pytest.raises(ResourceError):
        runtime.session().save(tmp_path / name)


class TestAdapterNames:
    @pytest.mark.parametrize(
        "name", ["CON", "con", "nul.txt", "Aux", "COM1", "lpt9.x.y", "a.", "x.."]
    )
    def test_what_windows_allows_for_no_file(
        self, name: str, bundle_copy: Path, parrot: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["add", str(bundle_copy), f"{name}={parrot}"]) == 3
        assert "Windows allows no file of this name" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["console", "com", "com10", "a.con", "null", "lpt", "v1.2"])
    def test_what_only_looks_like_it(self, name: str) -> None:
        assert check_adapter_name(name) is None

    @pytest.mark.parametrize(
        "name", [" sums", "sums ", "süms", "a/b", "a\\b", "a:b", "", ".a", "a*"]
    )
    def test_what_is_no_name_anywhere(self, name: str) -> None:
        assert check_adapter_name(name) is not None

    def test_names_that_differ_in_case_only(
        self, bundle_copy: Path, parrot: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """They would be one folder of tasks on Windows and macOS."""
        assert main(["add", str(bundle_copy), f"SUMS={parrot}"]) == 3
        assert "differs from sums in case only" in capsys.readouterr().err
        with pytest.raises(AdapterError, match="not a valid adapter name"):
            read_adapters({"Parrot": parrot, "parrot": parrot}, {})

    def test_files_that_differ_in_case_only(
        self, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copy(bundle_copy / "report.json", bundle_copy / "Report.json")
        if len(list(bundle_copy.glob("[rR]eport.json"))) < 2:
            pytest.skip("one file on this disk")
        assert main(["verify", str(bundle_copy)]) == 3
        assert "'Report.json', which manifest.json does not list" in capsys.readouterr().err


class TestTexts:
    """Files as editors on Windows save them."""

    LINES = ('{"prompt": "Grüße", "response": "ä\\nb"}', "", '{"prompt": "b", "response": "c"}')

    @pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "marked"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
    def test_samples(self, mark: bytes, end: str, tmp_path: Path) -> None:
        path = tmp_path / "samples.jsonl"
        path.write_bytes(mark + end.join((*self.LINES, "")).encode())
        first, second = read_samples(path)
        assert (first.prompt, first.response, second.response) == ("Grüße", "ä\nb", "c")

    def test_a_configuration_of_peft(self, bundle_copy: Path, parrot: Path, tmp_path: Path) -> None:
        adapter = tmp_path / "parrot"
        shutil.copytree(parrot, adapter)
        text = (parrot / CONFIG).read_text(encoding="utf-8")
        (adapter / CONFIG).write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
        assert main(["add", str(bundle_copy), f"parrot={adapter}", "-q"]) == 0

    def test_a_schema(self, tiny_bundle: Path, tmp_path: Path) -> None:
        pytest.importorskip("llguidance")
        path = tmp_path / "schema.json"
        schema = json.dumps({"type": "object", "properties": {"a": {"type": "null"}}}, indent=1)
        path.write_bytes(codecs.BOM_UTF8 + schema.replace("\n", "\r\n").encode())
        line = ["run", str(tiny_bundle), "Hi", "--json-schema", str(path), "--max-new-tokens", "3"]
        assert main(line) == 0

    @pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
    def test_other_encodings_are_refused(self, encoding: str, tmp_path: Path) -> None:
        path = tmp_path / "samples.jsonl"
        path.write_bytes("\n".join(self.LINES).encode(encoding))
        with pytest.raises(Exception, match="not UTF-8"):
            read_samples(path)


# What Python opens without an encoding it opens with that of the user's language: a warning then.
CODE_PAGE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
STRICT = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no LC_ALL; its code page is tested in CI")
@pytest.mark.parametrize("verb", ["inspect", "verify", "add", "route", "run", "chat", "remove"])
def test_another_encoding_by_default(verb: str, bundle_copy: Path, parrot: Path) -> None:
    samples = bundle_copy.with_name("samples.jsonl")
    samples.write_text('{"prompt": "Grüße 🦙", "response": "é"}\n' * 10, encoding="utf-8")
    more = {
        "add": [f"parrot={parrot}", "--examples", str(samples)],
        "remove": ["sums"],
        "route": ["How many?"],
        "run": ["-", "--max-new-tokens", "3"],
        "chat": ["--max-new-tokens", "3", "--system", "Be brief."],
    }
    line = [verb, str(bundle_copy), "--json", *more.get(verb, [])]
    done = subprocess.run(
        [sys.executable, *STRICT, "-m", "dlp_edge.cli.main", *line],
        input="Grüße 🦙".encode(),
        capture_output=True,
        env={**os.environ, **CODE_PAGE, "DLP_EDGE_TRACEBACK": "1"},
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    document = json.loads(done.stdout)
    assert "error" not in document


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_of_another_encoding(encoding: str, tiny_bundle: Path) -> None:
    """What it cannot show is a question mark, not an error."""
    import pty

    main_end, own_end = pty.openpty()
    line = ["run", str(tiny_bundle), "Hello", "--adapters", "sums", "--max-new-tokens", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dlp_edge.cli.main", *line, "-q"],
        stdout=own_end,
        stderr=subprocess.PIPE,
        env={**os.environ, **CODE_PAGE, "PYTHONIOENCODING": encoding},
    )
    os.close(own_end)
    errors = process.communicate(timeout=60)[1]
    shown = os.read(main_end, 4096).decode(encoding)
    os.close(main_end)
    assert (process.returncode, errors) == (0, b"")
    assert ("│" if encoding == "utf-8" else "?") in shown
