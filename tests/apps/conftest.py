"""What the tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dlp_edge import Runtime
from tests.testing.serving import Served, serving


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def served(runtime: Runtime) -> Iterator[Served]:
    with serving(runtime, body=20_000, messages=20) as served:
        yield served
