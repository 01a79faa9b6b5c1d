"""`keep` and `recompute` over 1,000 tokens, against PEFT models that do the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlp_edge.export.pipeline import export_bundle
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.decoding.sampling import Sampler, make_sampler
from tests.testing.engines import make_engine_for
from tests.testing.families import EOS, make_adapter, make_backbone
from tests.testing.oracle import Peft
from tests.testing.scripted_answer import ScriptedAnswer, by_peft, by_the_loop, script_of

pytestmark = pytest.mark.slow

COUNT = 1000
CONTEXT = 1100
PROMPT = np.random.default_rng(0).integers(0, EOS, 60).tolist()
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "target_modules": "all-linear"},
    "b": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "c": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [0]},
}


@pytest.fixture(scope="module", params=["llama3", "gemma2"])
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, Peft]:
    folder = tmp_path_factory.mktemp("policies")
    backbone = make_backbone(request.param, folder / "tiny", max_position_embeddings=CONTEXT)
    adapters = {
        name: make_adapter(backbone, folder / name, **settings)
        for name, settings in ADAPTERS.items()
    }
    export_bundle(str(backbone), adapters, None, folder / "bundle", "fp32")
    return make_engine_for(folder / "bundle", CONTEXT), Peft(backbone, adapters)


def sampler() -> Sampler:
    """Not greedy: a random model's greedy answer soon repeats itself."""
    return make_sampler(temperature=1.0, top_p=1.0, top_k=0, seed=0)


def test_both_policies_are_pefts_token_for_token(engines: tuple[Engine, Peft]) -> None:
    engine, oracle = engines
    script = script_of(list(ADAPTERS), COUNT)
    answers: list[ScriptedAnswer] = []
    for kv in ("keep", "recompute"):
        answer = ScriptedAnswer(PROMPT, script, COUNT, kv, sampler())  # type: ignore[arg-type]
        by_the_loop(engine, answer)
        expected = by_peft(oracle, answer)
        assert len(answer.tokens) == COUNT
        by_hand = sampler()
        assert answer.tokens == [by_hand(logits) for logits in expected]
        assert [x.argmax() for x in answer.logits] == [x.argmax() for x in expected]
        assert np.abs(np.stack(answer.logits) - np.stack(expected)).max() <= 1e-3
        answers.append(answer)
    kept, recomputed = (answer.tokens for answer in answers)
    assert kept != recomputed  # the policies differ, so this test can tell them apart
