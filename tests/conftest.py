"""Fixtures that many tests share, and the two tiers of the suite.

`pytest` makes its models with torch. `pytest -m "not slow"`, the fast tier, takes the bundle and
the adapters that are kept in tests/data/tiny, and imports neither torch nor what needs it.
"""

from __future__ import annotations

import gc
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from dlp_edge.runtime.engine.operators import OPERATORS_VARIABLE, find_operators
from tests.testing.paths import TINY
from tests.testing.tiny import (
    ADAPTERS,
    make_parrot,
    make_tiny_adapters,
    make_tiny_backbone,
    make_tiny_tasks,
)

# A busy machine is not a failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

HEAVY = {"torch", "transformers", "peft", "onnx"}
OWN, THEIRS = "own operator", "onnxruntime's"
# Fixtures that need torch in either tier.
NEED_TORCH = {"tiny_backbone", "tiny_router", "export_tiny"}


def is_fast(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "not slow"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The fast tier does not even import modules that are slow as a whole: they import torch."""
    if collection_path.suffix == ".py" and is_fast(config):
        text = collection_path.read_text(encoding="utf-8")
        if re.search(r"^pytestmark = pytest\.mark\.slow$", text, re.MULTILINE):
            return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        if not NEED_TORCH.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def light_heap() -> Iterator[None]:
    """Loading and failing to load collect garbage; torch's and transformers' million objects
    would make that a third of a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def no_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    """No module of the fast tier imports what only making a model needs."""
    yield
    if is_fast(request.config):
        found = sorted(HEAVY & sys.modules.keys())
        assert found == [], f"{request.node.name} imports {found}, or what it imports does"


@pytest.fixture(scope="module", params=[OWN, THEIRS])
def operators(request: pytest.FixtureRequest) -> Iterator[bool]:
    """What a module's runtimes run on, one after the other."""
    own = request.param == OWN
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OPERATORS_VARIABLE, "best" if own else "0")
        if own and find_operators() is None:
            pytest.skip("our own operator could not be built, or not for this processor")
        yield own


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_backbone(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_adapters(request: pytest.FixtureRequest) -> dict[str, Path]:
    """The PEFT adapters of the tiny bundle."""
    if is_fast(request.config):
        return {name: TINY / name for name in ADAPTERS}
    backbone: Path = request.getfixturevalue("tiny_backbone")
    return make_tiny_adapters(backbone, backbone.parent)


@pytest.fixture(scope="session")
def parrot(request: pytest.FixtureRequest) -> Path:
    """A new adapter that fits the tiny bundle's slots."""
    if is_fast(request.config):
        return TINY / "parrot"
    backbone: Path = request.getfixturevalue("tiny_backbone")
    return make_parrot(backbone, backbone.parent)


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True, scope="session")
def short_training(pytestconfig: pytest.Config) -> Iterator[None]:
    """A request splitter of a few steps: the tests do not judge how well it splits."""
    with pytest.MonkeyPatch.context() as patch:
        if not is_fast(pytestconfig):
            patch.setattr("dlp_edge.models.splitter.training.STEPS", 60)
        yield


@pytest.fixture(scope="session")
def tiny_router(tiny_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dlp_edge.models.training import train_router

    out = tmp_path_factory.mktemp("router") / "router"
    train_router(tiny_tasks, out)
    return out


@pytest.fixture(scope="session")
def export_tiny(
    tiny_backbone: Path,
    tiny_adapters: dict[str, Path],
    tiny_router: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """The bundle of all of it in a format."""

    def export(quantisation: str) -> Path:
        from dlp_edge.export.pipeline import export_bundle

        out = tmp_path_factory.mktemp("bundle") / "tiny"
        export_bundle(str(tiny_backbone), tiny_adapters, tiny_router, out, quantisation)
        return out

    return export


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest) -> Path:
    """The fp32 bundle of all of it. Read-only: tests that change it copy it first."""
    if is_fast(request.config):
        return TINY / "bundle"
    export: Callable[[str], Path] = request.getfixturevalue("export_tiny")
    return export("fp32")


@pytest.fixture(scope="session")
def tiny_int8_bundle(request: pytest.FixtureRequest) -> Path:
    """The same in int8: what our own operator is for."""
    if is_fast(request.config):
        return TINY / "int8"
    export: Callable[[str], Path] = request.getfixturevalue("export_tiny")
    return export("int8")


@pytest.fixture(scope="module")
def either_bundle(operators: bool, request: pytest.FixtureRequest) -> Path:
    """A bundle for what a module's runtimes run on."""
    found: Path = request.getfixturevalue("tiny_int8_bundle" if operators else "tiny_bundle")
    return found


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
