"""The router folder of an export: read as bundles are, and refused as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Runtime
from dlp_edge.bundle.files import ROUTER, TOKENIZER
from dlp_edge.bundle.router_folder import ROUTING, dump_routing, open_router_folder
from dlp_edge.errors import BundleError
from dlp_edge.front.skills import RoutedSkills
from dlp_edge.runtime.routing.policy import policy_for
from tests.testing.fronts import make_router_folder


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    return make_router_folder(tiny_bundle, tmp_path / "export") / "router"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / ROUTING).read_text())
    change(document)
    (folder / ROUTING).write_text(json.dumps(document))


def test_it_routes_as_the_bundle_does(folder: Path, tiny_bundle: Path) -> None:
    skills = RoutedSkills.load(folder.parent, 4096)
    parsed = skills.parse({})
    policy = policy_for(parsed.routing, skills.router, skills.manifest)
    with Runtime(tiny_bundle) as runtime:
        for text in ("Write an email to Ann.", "Tom has 3 apples.", "Select row 7"):
            expected, found = runtime.route(text), policy.at_prompt(text).decision
            assert found is not None
            assert found.probabilities == expected.probabilities
            assert found.selected == expected.selected
            messages = [{"role": "user", "content": text}]
            assert len(skills.encoder.prompt_ids(messages, 512)) == runtime.tokenizer.count(text)


def test_it_reads_what_it_writes(folder: Path) -> None:
    manifest = open_router_folder(folder).manifest
    (folder / ROUTING).write_text(dump_routing(manifest))
    assert open_router_folder(folder).manifest == manifest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(format="other"), "not that of a router folder"),
        (lambda d: d.update(version=2), "version '2'"),
        (lambda d: d.update(version=True), "version"),
        (lambda d: d.update(more=1), "more is unknown"),
        (lambda d: d.pop("max_rank"), "max_rank is missing"),
        (lambda d: d.update(max_skills=0), "max_skills is 0"),
        (lambda d: d.update(max_rank=-1), "max_rank is -1"),
        (lambda d: d["files"].pop(TOKENIZER), "does not list exactly"),
        (lambda d: d["files"].update({"../x": d["files"][TOKENIZER]}), "does not list exactly"),
        (lambda d: d["files"][TOKENIZER].update(size=1 << 40), "the limit is"),
        (lambda d: d["files"][TOKENIZER].update(sha256="x"), "invalid SHA-256"),
        (lambda d: d["router"]["settings"].update(labels=["nobody"]), "is not an adapter"),
        (lambda d: d["backbone"].update(vocab_size=0), "vocab_size is 0"),
        (lambda d: d["backbone"].update(eos_token_ids=[1 << 30]), "eos_token_id"),
        (lambda d: d["adapters"].append(d["adapters"][0]), "duplicate adapter"),
    ],
)
def test_a_manifest_that_no_export_writes_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], match: str
) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=match):
        open_router_folder(folder)


def test_damage_is_found(folder: Path) -> None:
    data = (folder / ROUTER).read_bytes()
    (folder / ROUTER).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="has been changed"):
        RoutedSkills.load(folder.parent, 4096)
    (folder / ROUTER).write_bytes(data[:-1])
    with pytest.raises(BundleError, match="bytes instead of"):
        open_router_folder(folder)
    (folder / ROUTER).unlink()
    with pytest.raises(BundleError, match="is missing"):
        open_router_folder(folder)
    (folder / ROUTING).write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        open_router_folder(folder)
    (folder / ROUTING).unlink()
    with pytest.raises(BundleError, match="there is no"):
        open_router_folder(folder)
