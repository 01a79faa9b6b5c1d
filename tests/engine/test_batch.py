"""Several sequences in one pass, each with its own length, fusion and sentence ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dlp_edge import ContextLengthError, Runtime, UsageError
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.options import GenerateOptions
from tests.testing.engines import make_engine_for

FUSIONS: list[dict[str, float]] = [
    {},
    {"sums": 1.0},
    {"sql": 0.6, "email": 0.4},
    {"sums": 0.2, "sql": -0.3, "email": 1.4},
]
PROMPTS = [
    "Hi",
    "Tom has 3 apples and buys 4. How many?",
    "Select the name of row 7",
    "Write an email to Ann about day 12. " * 4,
    "Select the age of row 9. Also, write an email to Bob about day 3",
    "x" * 130,
    "What now? And then?",
    "Tom has 13 apples and buys 40. How many?",
]


@pytest.fixture(scope="module")
def runtime(either_bundle: Path) -> Iterator[Runtime]:
    with Runtime(either_bundle) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def engine(either_bundle: Path) -> Engine:
    return make_engine_for(either_bundle, 256, sequences=4)


@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_a_batch_is_token_equal_to_each_alone(runtime: Runtime, kv: str) -> None:
    options = GenerateOptions(max_new_tokens=80, kv=kv, temperature=0.0)  # type: ignore[typeddict-item]
    alone = [runtime.generate(prompt, **options) for prompt in PROMPTS]
    batch = runtime.generate_batch(PROMPTS, **options)
    assert [reply.text for reply in batch] == [reply.text for reply in alone]
    assert [reply.sentences for reply in batch] == [reply.sentences for reply in alone]
    assert [reply.usage for reply in batch] == [reply.usage for reply in alone]
    assert [reply.finish_reason for reply in batch] == [reply.finish_reason for reply in alone]


def test_each_prompt_can_have_its_own_fusion_length_and_seed(runtime: Runtime) -> None:
    each = [
        GenerateOptions(adapters=fusion, max_new_tokens=5 + 11 * i, temperature=0.8, seed=i)
        for i, fusion in enumerate(FUSIONS * 2)
    ]
    alone = [runtime.generate(p, **own) for p, own in zip(PROMPTS, each, strict=True)]
    for places in (1, 3, 8):  # fewer places than prompts: one that ends makes room
        batch = runtime.generate_batch(PROMPTS, each, max_batch=places)
        assert [reply.text for reply in batch] == [reply.text for reply in alone]
        assert [reply.sentences for reply in batch] == [reply.sentences for reply in alone]


def test_steps_of_different_lengths_and_fusions_give_the_logits_of_one_alone(
    engine: Engine,
) -> None:
    """The batched GEMM of eq. 6 under attention over caches of different lengths."""
    decoder, fuser = engine.decoder, engine.fuser
    ids = np.random.default_rng(0).integers(0, 256, (4, 90)).tolist()
    lengths = [1, 20, 77, 50]
    for sequence, fusion in enumerate(FUSIONS):
        decoder.set_fusion(fuser.fuse(fusion, sequence))
    for sequence, length in enumerate(lengths):
        decoder.truncate(0, sequence)
        decoder.prefill(ids[sequence][:length], sequence=sequence)
    together = np.stack(
        [
            decoder.step([ids[s][length + step] for s, length in enumerate(lengths)]).copy()
            for step in range(10)
        ]
    )
    for sequence, length in enumerate(lengths):
        decoder.truncate(0, sequence)
        decoder.prefill(ids[sequence][:length], sequence=sequence)
        for step in range(10):
            alone = decoder.prefill([ids[sequence][length + step]], sequence=sequence)
            assert np.abs(alone - together[step, sequence]).max() <= 1e-4


def test_a_moved_sequence_goes_on_as_before(engine: Engine) -> None:
    decoder, fuser = engine.decoder, engine.fuser
    ids = np.random.default_rng(1).integers(0, 256, 40).tolist()
    decoder.set_fusion(fuser.fuse({"sql": 1.0}, 3))
    decoder.truncate(0, 3)
    decoder.prefill(ids[:30], sequence=3)
    decoder.move(3, 1)
    decoder.set_fusion(fuser.move(3, 1))
    expected = decoder.prefill(ids[30:], sequence=3).copy()
    assert np.abs(decoder.prefill(ids[30:], sequence=1) - expected).max() <= 1e-4


def test_a_smaller_fusion_leaves_nothing_of_a_larger_one(engine: Engine) -> None:
    decoder, fuser = engine.decoder, engine.fuser
    ids = list(range(30))
    decoder.set_fusion(fuser.fuse({}, 2))
    decoder.truncate(0, 2)
    expected = decoder.prefill(ids, sequence=2).copy()
    fuser.fuse({"sums": 1.0, "sql": 1.0, "email": 1.0}, 2)
    decoder.set_fusion(fuser.fuse({}, 2))
    decoder.truncate(0, 2)
    np.testing.assert_array_equal(decoder.prefill(ids, sequence=2), expected)


def test_bad_batches_are_refused_before_anything_is_generated(runtime: Runtime) -> None:
    assert runtime.generate_batch([]) == []
    with pytest.raises(UsageError, match="list of prompts"):
        runtime.generate_batch("one prompt")
    with pytest.raises(UsageError, match="max_batch"):
        runtime.generate_batch(PROMPTS, max_batch=0)
    with pytest.raises(UsageError, match="options for 1"):
        runtime.generate_batch(PROMPTS, [{}])
    with pytest.raises(UsageError, match="empty"):
        runtime.generate_batch(["fine", ""])
    with pytest.raises(ContextLengthError):
        runtime.generate_batch(["fine", "x" * 600])


def test_closing_ends_a_batch(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle)

    def close() -> None:
        while runtime._scheduler._driver is None:
            time.sleep(0.01)
        runtime.close()

    closer = threading.Thread(target=close)
    closer.start()
    replies = runtime.generate_batch(PROMPTS * 50, max_new_tokens=300)
    closer.join()
    assert replies[-1].finish_reason == "cancelled"
