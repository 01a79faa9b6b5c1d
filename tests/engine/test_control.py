"""What an application can ask of an answer: adapters, log probabilities, penalties, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax

from dlp_edge import Runtime, UsageError
from dlp_edge.runtime.decoding.sampling import log_probabilities, penalise
from dlp_edge.types import RouteDecision
from tests.testing.reference_sampling import distribution


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle) as runtime:
        yield runtime


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Bob"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_the_application_may_overrule_the_router(runtime: Runtime) -> None:
    seen: list[tuple[RouteDecision, str]] = []

    def overrule(decision: RouteDecision, text: str) -> Any:
        seen.append((decision, text))
        return None if not text else {"email": 0.25}

    prompt = "Tom has 3 apples and buys 4. How many?"
    free = runtime.generate(prompt, max_new_tokens=200, temperature=1.0, seed=3)
    reply = runtime.generate(prompt, max_new_tokens=200, temperature=1.0, seed=3, on_route=overrule)
    assert reply.sentences[0] == free.sentences[0]
    assert len(reply.sentences) > 1
    assert all(sentence.fusion == {"email": 0.25} for sentence in reply.sentences[1:])
    assert seen[0][1] == ""
    assert all(reply.text.startswith(text) for _, text in seen)
    pinned: list[RouteDecision] = []
    runtime.generate(prompt, adapters={}, max_new_tokens=5, on_route=lambda d, _: pinned.append(d))
    assert not pinned


def test_a_callback_that_fails_reaches_the_caller_and_frees_the_runtime(runtime: Runtime) -> None:
    def explode(decision: RouteDecision, text: str) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        runtime.generate("Hello", on_route=explode)
    with pytest.raises(UsageError, match="no adapter 'nobody'"):
        runtime.generate("Hello", on_route=lambda decision, text: "nobody")
    assert runtime.generate("Hello", adapters={}, max_new_tokens=3, wait=False).text


def test_log_probabilities(runtime: Runtime) -> None:
    options: dict[str, Any] = {"adapters": "sums", "max_new_tokens": 12}
    plain = runtime.generate("Hello", **options)
    reply = runtime.generate("Hello", logprobs=3, **options)
    assert plain.tokens == ()
    assert reply.text == plain.text
    assert len(reply.tokens) == reply.usage.completion_tokens
    for token in reply.tokens:
        assert token.top[0] == (token.id, token.text, token.logprob)  # greedy
        assert len(token.top) == 3
        scores = [score for _, _, score in token.top]
        assert scores == sorted(scores, reverse=True)
        assert sum(np.exp(scores)) <= 1
    chunks = list(runtime.stream("Hello", logprobs=0, **options))
    given = [token for chunk in chunks for token in chunk.tokens]
    assert [token.id for token in given] == [token.id for token in reply.tokens]
    assert all(token.top == () for token in given)


def test_stop_tokens(runtime: Runtime) -> None:
    options: dict[str, Any] = {"adapters": "sums", "max_new_tokens": 12, "logprobs": 0}
    tokens = [token.id for token in runtime.generate("Hello", **options).tokens]
    stopped = runtime.generate("Hello", stop_tokens=[tokens[3]], **options)
    assert stopped.finish_reason == "stop"
    assert [token.id for token in stopped.tokens] == tokens[: tokens.index(tokens[3])]


def test_a_penalty_against_repetition(runtime: Runtime) -> None:
    options: dict[str, Any] = {"adapters": {}, "max_new_tokens": 60, "logprobs": 0}
    plain = runtime.generate("Hello", **options).tokens
    varied = runtime.generate("Hello", repetition_penalty=5.0, **options).tokens
    assert len({t.id for t in varied}) > len({t.id for t in plain})


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_that_follows_a_schema(runtime: Runtime, temperature: float) -> None:
    for seed in range(3):
        reply = runtime.generate(
            "Who is it?", json_schema=SCHEMA, temperature=temperature, seed=seed
        )
        answer = json.loads(reply.text)
        assert reply.finish_reason == "stop"
        assert set(answer) == {"name", "age", "tags"}
        assert answer["name"] in ("Ann", "Bob")
        assert 0 <= answer["age"] <= 99
        assert len(answer["tags"]) <= 2
        assert "\n" not in reply.text
    batch = runtime.generate_batch(["Who?", "Who else?"], json_schema=json.dumps(SCHEMA))
    assert all(json.loads(reply.text)["name"] in ("Ann", "Bob") for reply in batch)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json_schema": {"type": "nonsense"}}, "json_schema"),
        ({"json_schema": "no json"}, "json_schema"),
        ({"json_schema": {"type": "string", "pattern": "^(a{1000}){1000}$"}}, "repeats too often"),
        ({"json_schema": {"a": object()}}, "json_schema"),
        ({"min_p": 2}, "min_p is 2"),
        ({"min_p": -1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop_tokens": ["x"]}, "stop token"),
        ({"stop_tokens": [[1]]}, "stop token"),
        ({"stop_tokens": 5}, "stop_tokens"),
        ({"adapters": [["x"]]}, "adapters"),
    ],
    ids=str,
)
def test_options_that_are_wrong(runtime: Runtime, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        runtime.generate("Hello", **{"adapters": {}, **options})


vectors = arrays(np.float32, st.integers(2, 40), elements=st.floats(-20, 20, width=32))


@given(vectors, st.floats(0.1, 3), st.floats(0.01, 1))
def test_min_p_keeps_what_is_probable_enough_beside_the_first(
    logits: Any, temperature: float, min_p: float
) -> None:
    ids, probabilities = distribution(logits, temperature, 1.0, 0, min_p)
    every, before = distribution(logits, temperature, 1.0, 0)
    expected = [i for i, p in zip(every.tolist(), before, strict=True) if p >= min_p * before[0]]
    assert ids.tolist() == expected
    np.testing.assert_allclose(probabilities, before[: len(ids)] / before[: len(ids)].sum())


@pytest.mark.slow
@given(vectors, st.floats(1, 5), st.integers(0, 2**32))
def test_penalties_as_transformers_has_them(logits: Any, penalty: float, seed: int) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    seen = np.random.default_rng(seed).random(len(logits)) < 0.5
    seen[0] = True
    processor = RepetitionPenaltyLogitsProcessor(penalty=penalty)
    ids = torch.from_numpy(np.flatnonzero(seen))[None]
    expected = processor(ids, torch.tensor(logits.copy())[None])[0].numpy()
    np.testing.assert_allclose(penalise(logits, seen, penalty), expected, rtol=1e-6)


@given(vectors)
def test_log_probabilities_as_scipy_has_them(logits: Any) -> None:
    np.testing.assert_allclose(
        log_probabilities(logits), log_softmax(logits.astype(np.float64)), atol=1e-9
    )
