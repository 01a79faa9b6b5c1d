"""Bundles of former releases, kept: today's code reads them and answers as they did (the rule is
in docs/bundle.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.files import MANIFEST
from dlp_edge.bundle.manifest import VERSION
from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.errors import BundleError
from tests.testing.kept_bundle import answers
from tests.testing.paths import DATA

KEPT = sorted(DATA.glob("bundle-v*/"))


def test_there_is_one_of_this_version() -> None:
    assert DATA / f"bundle-v{VERSION}" in KEPT


@pytest.mark.parametrize("bundle", KEPT, ids=lambda path: path.name)
def test_a_kept_bundle_answers_as_it_did(bundle: Path) -> None:
    verify_bundle(bundle)
    expected = json.loads((DATA / f"{bundle.name}.answers.json").read_text(encoding="utf-8"))
    for was, now in zip(expected, answers(bundle), strict=True):
        assert now["text"] == was["text"]
        assert now["logprobs"] == pytest.approx(was["logprobs"], abs=2e-3)
        assert now["probabilities"] == pytest.approx(was["probabilities"], abs=2e-3)


def test_they_are_small() -> None:
    for bundle in KEPT:
        assert sum(path.stat().st_size for path in bundle.iterdir()) < 300_000


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, 0, -1, 2.0, "2", None, True])
def test_versions_that_are_not_read(version: object, tmp_path: Path) -> None:
    """A reader takes its own version (and those that it says); of others it reads nothing more."""
    copy = Path(shutil.copytree(KEPT[-1], tmp_path / "copy"))
    document = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    (copy / MANIFEST).write_text(json.dumps({"version": version, "format": document["format"]}))
    with pytest.raises(BundleError, match="format version") as raised:
        open_bundle(copy)
    assert "Update dlp-edge" in raised.value.remedy
