"""The documentation: its snippets run, what it cites exists, its site builds without warnings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testing.paths import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "recipes" / "README.md"],
    key=lambda path: path.as_posix(),
)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
SNIPPETS = ("README.md", "docs/embedding.md")
MOST_WORDS = 900  # of the README
# `folder/file.py` or `folder/`, of a folder at the top of the repository.
CITED = re.compile(
    r"(?<![\w/])"
    r"((?:benchmarks|dlp_edge|docs|examples|export|models|recipes|runtime|tests|\.ci)/[\w./-]*)"
)
GONE = "docs/decisions.md"  # the changelog says so
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([\w-]+))?\)")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors_of(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[ ]+", "-", re.sub(r"[^\w -]", "", heading.lower()).strip())
        for heading in headings
    }


def blocks() -> Iterator[object]:
    for name in SNIPPETS:
        found = re.findall(r"```python\n(.*?)```", text_of(name), re.DOTALL)
        assert found
        for i, block in enumerate(found):
            yield pytest.param(block, id=f"{name}-{i}")


@pytest.mark.parametrize("block", blocks())
def test_snippets_run(
    block: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dlp_edge.demo.demo import bundle_folder

    monkeypatch.setenv("DLP_EDGE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_bundle, bundle_folder())  # where `dlp-edge demo` would put it
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    if "Runtime(" not in block:  # goes on from a snippet before it
        from dlp_edge import Runtime

        names["rt"] = Runtime("bundle")
    exec(compile(block, "<snippet>", "exec"), names)


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= MOST_WORDS


def test_ci_runs_the_readmes_tests() -> None:
    """What CI installs and runs is what the README says."""
    [command] = [line for line in text_of("README.md").splitlines() if line.endswith("&& pytest")]
    install = re.search(r"-c constraints\.txt -e \"\.\[[\w,]+\]\"", command)
    assert install
    run = text_of(".ci/run")
    assert install[0] in run
    assert re.search(r"^pytest$", run, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_cited_paths_exist(name: str) -> None:
    cited = {path.rstrip(".") for path in CITED.findall(text_of(name)) if "NAME" not in path}
    missing = sorted(path for path in cited - {GONE} if not (ROOT / path).exists())
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str) -> None:
    page = ROOT / name
    for target, anchor in LINK.findall(text_of(name)):
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), target
        assert not anchor or anchor in anchors_of(path), f"{target}#{anchor}"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Every warning is an error, and every page is in its navigation."""
    commands = pytest.importorskip("mkdocs.commands.build")
    config = pytest.importorskip("mkdocs.config")
    loaded = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    loaded.plugins.on_startup(command="build", dirty=False)
    commands.build(loaded)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    for name in NAMES:
        if name.startswith("docs/"):
            assert name.removeprefix("docs/").replace(".md", ".html") in pages
    html = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html"))
    loads = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?://[^\"]+)", html)
    assert not [url for url in loads if 'rel="canonical"' not in url]
