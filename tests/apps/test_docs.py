"""The snippets of the documentation run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.testing.paths import ROOT

BLOCKS = [
    pytest.param(block, id=f"{name}-{i}")
    for name in ("README.md", "docs/embedding.md")
    for i, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_snippets(
    block: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    if "Runtime(" not in block:  # goes on from a snippet before it
        from dlp_edge import Runtime

        names["rt"] = Runtime("bundle")
    exec(compile(block, "<snippet>", "exec"), names)
