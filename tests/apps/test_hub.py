"""Fetching bundles from a hub-like server and from a plain web folder, and publishing them."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlp_edge import BundleError, ResourceError, Runtime, UsageError
from dlp_edge.cli.main import main
from dlp_edge.hub import origins
from dlp_edge.hub.fetch import fetch_bundle
from tests.testing.hub_server import TOKEN, HubServer

NAME = "someone/tiny"
DATA = "backbone.onnx.data"


@pytest.fixture
def hub(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    server.repositories[NAME] = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    server.repositories[NAME]["README.md"] = b"A card."
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with contextlib.suppress(ImportError):  # the server has no Xet; a variable is read too early
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("DLP_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(origins, "PAUSE", 0.0)
    yield server
    server.close()


@pytest.fixture(params=["hub", "url"])
def source(request: pytest.FixtureRequest, hub: HubServer) -> str:
    """The same bundle by its id, and by the address of its folder."""
    if request.param == "hub":
        pytest.importorskip("huggingface_hub")
        return NAME
    return f"{hub.url}/{NAME}/resolve/main"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_is_fetched_whole(
    source: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["pull", source, "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["adapters"] == ["sums", "sql", "email"]
    assert files_of(out) == files_of(tiny_bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_is_that_of_all_bytes(source: str, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    fetch_bundle(source, tmp_path / "out", on_progress=lambda *at: told.append(at))
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert (fractions[0], told[-1]) == (0.0, ("done", 1.0))
    assert DATA in {name for name, _ in told}


def test_the_runtime_loads_what_it_fetches(source: str, hub: HubServer) -> None:
    with Runtime.from_hub(source, max_context=64) as runtime:
        assert runtime.generate("Hello", adapters={}, max_new_tokens=3).text
    assert (DATA, 0) in hub.gets
    hub.gets.clear()
    Runtime.from_hub(source).close()
    assert {name for name, _ in hub.gets} <= {"manifest.json"}


def test_without_the_origin_the_cache_is_used(
    source: str, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    Runtime.from_hub(source).close()
    hub.repositories.clear()
    with caplog.at_level(logging.WARNING, "dlp_edge"):
        if source == NAME:
            Runtime.from_hub(source).close()
            assert "the copy in the cache is used" in caplog.text
    with pytest.raises((BundleError, ResourceError)):
        Runtime.from_hub(source.replace("tiny", "other"))


def test_a_new_edition_replaces_the_old_one(
    source: str, hub: HubServer, bundle_copy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    fetch_bundle(source, out)
    with Runtime(bundle_copy) as runtime:
        runtime.remove_adapter("sql")
    hub.repositories[NAME] = files_of(bundle_copy)
    fetch_bundle(source, out)
    assert files_of(out) == files_of(bundle_copy)


def test_a_broken_download_goes_on(hub: HubServer, tiny_bundle: Path, tmp_path: Path) -> None:
    hub.break_after = 100_000
    fetch_bundle(f"{hub.url}/{NAME}/resolve/main", tmp_path / "out")
    broken = [name for name, start in hub.gets if start]
    assert len(broken) == 1
    assert (broken[0], 100_000) in hub.gets
    assert files_of(tmp_path / "out") == files_of(tiny_bundle)


def test_a_server_without_ranges_sends_all_again(
    hub: HubServer, tiny_bundle: Path, tmp_path: Path
) -> None:
    hub.break_after, hub.no_ranges = 100_000, True
    fetch_bundle(f"{hub.url}/{NAME}/resolve/main", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tiny_bundle)


def test_an_interrupted_fetch_resumes(source: str, hub: HubServer, tmp_path: Path) -> None:
    """Ctrl-C in the middle; what is whole is not fetched again."""

    def interrupt(stage: str, fraction: float) -> None:
        if stage == "router.onnx":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_bundle(source, tmp_path / "out", on_progress=interrupt)
    assert not (tmp_path / "out").exists()
    hub.gets.clear()
    fetch_bundle(source, tmp_path / "out")
    assert DATA not in {name for name, _ in hub.gets}
    Runtime(tmp_path / "out").close()


def test_a_file_of_another_content_is_refused(source: str, hub: HubServer, tmp_path: Path) -> None:
    data = hub.repositories[NAME][DATA]
    for other in (data[:-1] + b"x", b"x" + data, data[:-1]):
        hub.repositories[NAME][DATA] = other
        with pytest.raises((BundleError, ResourceError), match=f"{DATA} was fetched|broke off"):
            fetch_bundle(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    hub.repositories[NAME][DATA] = data
    fetch_bundle(source, tmp_path / "out")


def test_what_cannot_be_fetched(hub: HubServer, source: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(UsageError, match="not written by dlp-edge"):
        fetch_bundle(source, other)
    for wrong in ("nothing", "a/b/c", "file:///etc", "../x/y"):
        with pytest.raises(UsageError, match="neither a hub id nor a URL"):
            fetch_bundle(wrong, tmp_path / "out")
    with pytest.raises((BundleError, ResourceError), match=r"manifest\.json|fetched"):
        fetch_bundle(source.replace("tiny", "none"), tmp_path / "out")
    del hub.repositories[NAME]["report.json"]
    with pytest.raises(BundleError, match=r"report\.json is missing"):
        fetch_bundle(source, tmp_path / "out")
    hub.repositories[NAME]["manifest.json"] = b"{}"
    with pytest.raises(BundleError, match="not a dlp-edge bundle"):
        fetch_bundle(source, tmp_path / "out")
    with pytest.raises(UsageError, match="no revisions"):
        fetch_bundle(f"{hub.url}/x", tmp_path / "out", revision="main")


def test_a_server_that_is_not_there(
    source: str, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is not the same as a bundle that is not there; a copy in the cache still serves."""
    with Runtime.from_hub(source, threads=1):
        pass
    hub.close()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # connections outlive their server
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    with pytest.raises(ResourceError, match="cannot be fetched"):
        fetch_bundle(source, tmp_path / "out")
    with Runtime.from_hub(source, threads=1) as runtime:
        assert len(runtime.adapters) == 3


def test_publishing_and_fetching_again(
    hub: HubServer, bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("huggingface_hub")
    (bundle_copy / ".DS_Store").write_text("not to be published")
    options = ["--private", "--license", "apache-2.0", "--base-model", "someone/base"]
    assert main(["push", str(bundle_copy), "me/mine", *options]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/me/mine/commit/")
    published = hub.repositories["me/mine"]
    card = published.pop("README.md").decode()
    assert card.startswith("---\nlibrary_name: dlp-edge\n")
    header = ("license: apache-2.0", "base_model: someone/base")
    for text in (*header, 'from_hub("me/mine")', "| sql |"):
        assert text in card
    assert hub.private["me/mine"]
    (bundle_copy / ".DS_Store").unlink()
    assert published == files_of(bundle_copy)
    assert any(line["key"] == "lfsFile" for line in hub.commits)
    fetch_bundle("me/mine", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(bundle_copy)


def test_what_cannot_be_published(
    hub: HubServer, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    assert main(["push", str(bundle_copy), "mine"]) == 2
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert main(["push", str(bundle_copy), "me/mine"]) == 4
    path = bundle_copy / DATA
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert main(["push", str(bundle_copy), "me/mine"]) == 3
    assert "me/mine" not in hub.repositories
