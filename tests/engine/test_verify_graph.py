"""A verify pass over k tokens equals k steps bit for bit; otherwise speculation changes answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlp_edge import Runtime
from dlp_edge.errors import ResourceError
from dlp_edge.export.pipeline import export_bundle
from dlp_edge.onnx_bytes.protobuf import BYTES, VARINT, Field, read_message, write_message
from dlp_edge.runtime.engine.backbone import VERIFY_TOKENS
from dlp_edge.runtime.engine.decoder import Decoder
from dlp_edge.runtime.engine.interrupt import Cancelled, Interrupt

pytestmark = pytest.mark.slow

FUSIONS: list[dict[str, float]] = [
    {},
    {"sums": 1.0},
    {"email": 0.5, "sql": 0.5},
    {"sums": 0.2, "email": 0.5, "sql": 0.3},
]
TOKENS = np.random.default_rng(0).integers(0, 256, 120).tolist()


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def runtime(
    request: pytest.FixtureRequest,
    operators: bool,
    tiny_backbone: Path,
    tiny_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Runtime]:
    out = tmp_path_factory.mktemp("verify") / "bundle"
    export_bundle(str(tiny_backbone), tiny_adapters, None, out, quantisation=request.param)
    with Runtime(out, max_context=200, threads=2) as loaded:
        yield loaded


def begin(runtime: Runtime, fusion: dict[str, float], length: int) -> Decoder:
    """A decoder that has read so many tokens under a fusion."""
    engine = runtime._open().engine
    engine.decoder.set_fusion(engine.fuser.fuse(fusion))
    engine.decoder.truncate(0)
    engine.decoder.prefill(TOKENS[:length])
    return engine.decoder


def cache_of(decoder: Decoder) -> np.ndarray:
    length = int(decoder.lengths[0])
    return np.stack([rows.host[0, :, :length] for rows in decoder._cache.values()])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fusion=st.sampled_from(FUSIONS),
    begun=st.integers(1, 60),
    passes=st.lists(
        st.tuples(st.integers(1, VERIFY_TOKENS), st.integers(0, VERIFY_TOKENS)),
        min_size=1,
        max_size=6,
    ),
)
def test_it_is_steps_bit_for_bit(
    runtime: Runtime, fusion: dict[str, float], begun: int, passes: list[tuple[int, int]]
) -> None:
    """Also with tokens behind them that are forgotten again."""
    count = sum(right for right, _ in passes)
    decoder = begin(runtime, fusion, begun)
    stepped = np.stack([decoder.step([t])[0].copy() for t in TOKENS[begun : begun + count]])
    cache = cache_of(decoder)
    decoder = begin(runtime, fusion, begun)
    verified = []
    for right, wrong in passes:
        at = int(decoder.lengths[0])
        tokens = TOKENS[at : at + right] + [7] * min(wrong, VERIFY_TOKENS - right)
        verified.append(decoder.verify(tokens)[:right].copy())
        decoder.truncate(at + right)
    np.testing.assert_array_equal(np.concatenate(verified), stepped)
    np.testing.assert_array_equal(cache_of(decoder), cache)
    assert [token for token, _ in decoder._written[0]] == TOKENS[: begun + count]


def test_it_needs_room_for_all_its_rows(runtime: Runtime) -> None:
    decoder = begin(runtime, {}, 100)
    decoder.prefill(TOKENS[: 100 - VERIFY_TOKENS])
    assert len(decoder.verify([1])) == 1
    with pytest.raises(ResourceError, match="holds 200 tokens, 201 are needed"):
        decoder.verify([1, 2])
    assert decoder.lengths[0] == 201 - VERIFY_TOKENS


def test_it_can_be_interrupted(runtime: Runtime) -> None:
    decoder = begin(runtime, {}, 50)
    interrupt = Interrupt()
    timer = threading.Timer(0.05, interrupt.set)

    def read_on() -> None:
        while True:
            decoder.verify(TOKENS[:VERIFY_TOKENS], interrupt)
            decoder.truncate(50)

    timer.start()
    with pytest.raises(Cancelled):
        read_on()
    timer.join()
    assert decoder.lengths[0] == 50
    assert len(decoder.verify(TOKENS[:VERIFY_TOKENS])) == VERIFY_TOKENS


@given(
    st.dictionaries(
        st.integers(1, 40),
        st.lists(st.binary(max_size=300) | st.integers(0, 2**64 - 1), min_size=1, max_size=3),
    )
)
def test_a_message_that_was_written_is_read_again(message: dict[int, list[int | bytes]]) -> None:
    fields = {
        number: [value for value in values if type(value) is type(values[0])]
        for number, values in message.items()
    }
    known = {
        number: Field(VARINT if isinstance(values[0], int) else BYTES, repeated=True)
        for number, values in fields.items()
    }
    assert read_message(memoryview(write_message(fields)), known) == fields
