"""The exported graph against transformers + PEFT, in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dlp_edge.runtime.decoding.engine import Engine
from tests.testing.engines import make_engine_for
from tests.testing.oracle import Peft

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(0).integers(0, 256, 200).tolist()


@pytest.fixture(scope="module")
def oracle(tiny_backbone: Path, tiny_adapters: dict[str, Path]) -> Peft:
    return Peft(tiny_backbone, tiny_adapters)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return make_engine_for(tiny_bundle, 512)


FUSIONS: list[dict[str, float]] = [
    {},
    {"sums": 1.0},
    {"sql": 1.0},
    {"email": 1.0},
    {"sums": 0.6, "sql": 0.4},
    {"sql": 0.5, "email": 0.5},
    {"sums": 0.2, "sql": -0.3, "email": 1.4},
]


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_logits_equal_pefts(engine: Engine, oracle: Peft, fusion: dict[str, float]) -> None:
    decoder, fuser = engine.decoder, engine.fuser
    decoder.set_fusion(fuser.fuse(fusion))
    decoder.truncate(0)
    expected = oracle.logits(IDS, fusion)
    assert np.abs(decoder.all_logits(IDS) - expected).max() <= 1e-3
    if fusion:
        assert np.abs(expected - oracle.logits(IDS, {})).max() > 0.05  # the fusion does something


def test_prefill_and_steps_equal_one_pass(engine: Engine, oracle: Peft) -> None:
    decoder, fuser = engine.decoder, engine.fuser
    fusion = {"sums": 0.6, "sql": 0.4}
    decoder.set_fusion(fuser.fuse(fusion))
    expected = oracle.logits(IDS, fusion)
    decoder.truncate(0)
    assert np.abs(decoder.prefill(IDS[:100]) - expected[99]).max() <= 1e-3
    for position in range(100, 200):
        assert np.abs(decoder.step([IDS[position]])[0] - expected[position]).max() <= 1e-3


def test_long_generations_stay_exact(engine: Engine, oracle: Peft) -> None:
    """Step by step to the end of the context, under a fusion."""
    decoder, fuser = engine.decoder, engine.fuser
    fusion = {"sums": 0.3, "sql": 0.3, "email": 0.4}
    ids = np.random.default_rng(1).integers(0, 256, decoder.max_context).tolist()
    decoder.set_fusion(fuser.fuse(fusion))
    decoder.truncate(0)
    found = np.stack([decoder.step([token])[0].copy() for token in ids])
    assert np.abs(found - oracle.logits(ids, fusion)).max() <= 1e-3


def test_truncating_and_prefilling_again(engine: Engine, oracle: Peft) -> None:
    decoder, fuser = engine.decoder, engine.fuser
    decoder.set_fusion(fuser.fuse({}))
    decoder.truncate(0)
    decoder.prefill(IDS)
    decoder.truncate(50)
    found = decoder.prefill(IDS[50:120])
    assert np.abs(found - oracle.logits(IDS[:120], {})[-1]).max() <= 1e-3


def test_recompute_and_keep_at_a_change_of_fusion(engine: Engine, oracle: Peft) -> None:
    """`recompute` is PEFT over the whole history under the new fusion; `keep` is not."""
    decoder, fuser = engine.decoder, engine.fuser
    before, after = {"sql": 1.0}, {"sums": 1.0}
    decoder.set_fusion(fuser.fuse(before))
    decoder.truncate(0)
    decoder.prefill(IDS[:100])
    decoder.set_fusion(fuser.fuse(after))
    kept = decoder.step([IDS[100]])[0].copy()
    decoder.truncate(0)
    decoder.prefill(IDS[:100])
    recomputed = decoder.step([IDS[100]])[0].copy()
    expected = oracle.logits(IDS[:101], after)[-1]
    assert np.abs(recomputed - expected).max() <= 1e-3
    assert np.abs(kept - expected).max() > 1e-3
