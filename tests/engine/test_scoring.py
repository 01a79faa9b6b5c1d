"""`Runtime.score` against transformers + PEFT, in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp
from tokenizers import Tokenizer

from dlp_edge import ContextLengthError, Runtime, UsageError
from tests.testing.oracle import Peft

pytestmark = pytest.mark.slow

PROMPT = "Select the name of row 7"
TEXTS = ["SELECT", "SELECT it", "No.", "ä — é", "x" * 150]


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Runtime:
    return Runtime(tiny_bundle, max_context=400)


@pytest.fixture(scope="module")
def oracle(tiny_backbone: Path, tiny_adapters: dict[str, Path]) -> Peft:
    return Peft(tiny_backbone, tiny_adapters)


def expected(
    tokenizer: Tokenizer, oracle: Peft, text: str, fusion: dict[str, float], ends: bool
) -> tuple[float, int]:
    asked = tokenizer.encode(f"<|user|>{PROMPT}<|end|><|assistant|>").ids
    told = tokenizer.encode(text).ids
    rows = log_softmax(oracle.logits(asked + told, fusion).astype(np.float64), axis=-1)
    total = sum(rows[len(asked) - 1 + i, token] for i, token in enumerate(told))
    if ends:
        total += logsumexp(rows[-1, [tokenizer.token_to_id("<|end|>")]])
    return float(total), len(told)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("fusion", [{}, {"sums": 1.0}, {"sql": 0.6, "email": 0.4}], ids=str)
def test_log_probabilities_are_pefts(
    runtime: Runtime, oracle: Peft, tiny_backbone: Path, fusion: dict[str, float], ends: bool
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_backbone / "tokenizer.json"))
    found = runtime.score(PROMPT, TEXTS, ends=ends, adapters=fusion)
    assert [one.text for one in found] == TEXTS
    for one in found:
        logprob, count = expected(tokenizer, oracle, one.text, fusion, ends)
        assert one.tokens == count
        assert one.logprob == pytest.approx(logprob, abs=1e-3 * (count + 1))


def test_routed_scores_are_those_of_the_routers_fusion(runtime: Runtime) -> None:
    weights = runtime.route(PROMPT, select="top_k", k=2).weights
    assert len(weights) == 2
    routed = runtime.score(PROMPT, TEXTS, select="top_k", k=2)
    assert routed == runtime.score(PROMPT, TEXTS, adapters=weights)
    assert routed != runtime.score(PROMPT, TEXTS, adapters={})


def test_order_and_what_came_before_change_nothing(runtime: Runtime) -> None:
    first = runtime.score(PROMPT, TEXTS, adapters="sql")
    runtime.generate("Something else", adapters="sums", max_new_tokens=5)
    backwards = runtime.score(PROMPT, TEXTS[::-1], adapters="sql")
    for one, other in zip(first, backwards[::-1], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    before = runtime.generate(PROMPT, adapters="sql", max_new_tokens=20).text
    runtime.score(PROMPT, TEXTS, adapters="sums")
    assert runtime.generate(PROMPT, adapters="sql", max_new_tokens=20).text == before


def test_scores_agree_with_the_log_probabilities_of_generate(runtime: Runtime) -> None:
    reply = runtime.generate(PROMPT, adapters="sql", max_new_tokens=1, logprobs=260)
    listed = {text: logprob for _, text, logprob in reply.tokens[0].top if text in "abcXYZ019.,"}
    scores = runtime.score(PROMPT, list(listed), adapters="sql")
    assert len(scores) == 11
    for one in scores:
        assert one.logprob == pytest.approx(listed[one.text], abs=1e-4)


def test_wrong_requests(runtime: Runtime) -> None:
    assert runtime.score(PROMPT, []) == []
    for texts in ("one text", ["", "b"], [" "], [3]):
        with pytest.raises(UsageError):
            runtime.score(PROMPT, texts)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        runtime.score(PROMPT, ["a"], adapters="nobody")
    with pytest.raises(ContextLengthError):
        runtime.score(PROMPT, ["a", "b" * 400])


def test_counting_tokens(runtime: Runtime) -> None:
    assert runtime.count_tokens("four") == 4  # the tiny tokenizer has bytes only
    assert runtime.count_tokens("") == 0


def test_a_closed_runtime_scores_nothing(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle)
    runtime.close()
    with pytest.raises(UsageError):
        runtime.score(PROMPT, ["a"])
