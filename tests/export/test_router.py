"""The router at run time: its windows, its export, its probabilities."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from dlp_edge.bundle.manifest import RouterSettings
from dlp_edge.bundle.router_head import RouterHead, head_from_bytes
from dlp_edge.errors import RouterError
from dlp_edge.export.router import build_graph, export_router
from dlp_edge.models.networks.router_mlp import BASE, EARLIER, RouterMLP
from dlp_edge.runtime.routing.router import PREFIX_LENGTHS, Router
from dlp_edge.runtime.routing.router_input import (
    ANSWER_SEGMENTS,
    MAX_ROUTER_INPUT,
    PROMPT_SEGMENTS,
    SEGMENTS,
    RouterInputEncoder,
)

pytestmark = pytest.mark.slow

WORDS = [f"w{i}" for i in range(50)]
SEPARATOR = len(WORDS) + 1
LABELS = ("a", "b", "c")
WIDTH = RouterMLP(2, 1).width


@pytest.fixture(scope="module")
def word_tokenizer() -> Tokenizer:
    """One id a word: what a window holds can be read off it."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def settings(**changes: Any) -> RouterSettings:
    return RouterSettings(
        **{
            "labels": LABELS,
            "prompt_tokens": 10,
            "generated_tokens": 20,
            "temperature": 1.0,
            **changes,
        }
    )


def segments(window: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in window:
        if token == SEPARATOR:
            found.append([])
        else:
            found[-1].append(token)
    return found


texts = st.lists(st.sampled_from([*WORDS, "\n", "?"]), max_size=300).map(" ".join)


def asked(window: list[int]) -> list[int]:
    return [token for part in segments(window)[:PROMPT_SEGMENTS] for token in part]


class TestWindow:
    @given(prompt=texts, generated=texts, spread=st.booleans())
    def test_never_exceeds_its_limits(
        self, word_tokenizer: Tokenizer, prompt: str, generated: str, spread: bool
    ) -> None:
        reader = RouterInputEncoder(word_tokenizer, settings(spread=spread))
        window = reader.encode(prompt, generated)
        assert len(segments(window)) == SEGMENTS
        assert len(asked(window)) <= 10
        assert sum(map(len, segments(window)[PROMPT_SEGMENTS:])) <= 20

    @given(prompt=texts, generated=texts)
    def test_ends_with_the_last_generated_token(
        self, word_tokenizer: Tokenizer, prompt: str, generated: str
    ) -> None:
        window = RouterInputEncoder(word_tokenizer, settings()).encode(prompt, generated)
        ids = word_tokenizer.encode(generated.rstrip()).ids
        assert segments(window)[-1][-1:] == ids[-1:]

    def test_keeps_head_and_tail_of_a_long_prompt(self, word_tokenizer: Tokenizer) -> None:
        window = RouterInputEncoder(word_tokenizer, settings()).encode(" ".join(WORDS), "")
        assert asked(window) == [1, 2, 3, 4, 5, 46, 47, 48, 49, 50]

    def test_parts_of_a_prompt_are_equal_and_not_tiny(self, word_tokenizer: Tokenizer) -> None:
        reader = RouterInputEncoder(word_tokenizer, settings(prompt_tokens=128))
        short = segments(reader.encode(" ".join(WORDS[:10]), ""))
        assert [len(part) for part in short[:PROMPT_SEGMENTS]] == [8, 2, 0, 0, 0, 0, 0, 0]
        long = segments(reader.encode(" ".join(WORDS * 2), ""))
        assert [len(part) for part in long[:PROMPT_SEGMENTS]] == [13] * 7 + [9]

    def test_reads_a_long_prompt_all_over(self, word_tokenizer: Tokenizer) -> None:
        reader = RouterInputEncoder(word_tokenizer, settings(prompt_tokens=24, spread=True))
        parts = segments(reader.encode(" ".join(WORDS[:28]), ""))[:PROMPT_SEGMENTS]
        assert parts == [[at + 1, at + 2, at + 3] for at in (0, 3, 7, 10, 14, 17, 21, 24)]
        longer = " ".join(WORDS * 4)
        parts = segments(reader.encode(longer, ""))[:PROMPT_SEGMENTS]
        assert [len(part) for part in parts] == [3] * PROMPT_SEGMENTS
        assert parts[0] == [1, 2, 3]
        assert parts[-1][-1] in (48, 49, 50)
        flat = longer.split()
        for part in parts:  # each is a run of words
            run = [WORDS[token - 1] for token in part]
            assert run in [flat[at : at + 3] for at in range(len(flat))]

    def test_lines_are_read_from_their_beginning(self, word_tokenizer: Tokenizer) -> None:
        reader = RouterInputEncoder(word_tokenizer, settings(prompt_tokens=24, spread=True))
        line = " ".join(["w9"] * 30)
        window = reader.encode(f"{line}\nw1 w2 w3 {line}\nw4 w5 w6 {line}", "")
        parts = segments(window)[:PROMPT_SEGMENTS]
        assert [2, 3, 4] in parts
        assert [5, 6, 7] in parts

    def test_beginnings_of_a_prompt_have_its_first_tokens_alone(
        self, word_tokenizer: Tokenizer
    ) -> None:
        reader = RouterInputEncoder(word_tokenizer, settings(prompt_tokens=128))
        begun = list(reader.encode_prefixes(" ".join(WORDS), PREFIX_LENGTHS))
        assert begun == [reader.encode(" ".join(WORDS[:count]), "") for count in PREFIX_LENGTHS]

    def test_keeps_apart_what_is_done_and_what_begins(self, word_tokenizer: Tokenizer) -> None:
        reader = RouterInputEncoder(word_tokenizer, settings(generated_tokens=24))
        line = " ".join(WORDS[10:30])
        window = reader.encode("w0", f"w1 w2\n{line}")
        assert segments(window)[PROMPT_SEGMENTS:] == [
            [2, 3],
            [11, 12, 13, 14, 15, 16],
            [17, 18, 19, 20],
            [21, 22, 23, 24, 25, 26, 27, 28],
            [29, 30],
        ]
        begun = segments(reader.encode("w0", "w1 w2\nw3\n"))[PROMPT_SEGMENTS:]
        assert begun == [[2, 3], [], [], [], [4]]
        assert segments(reader.encode("", "")) == [[]] * SEGMENTS

    def test_keeps_the_beginning_of_a_long_line(self, word_tokenizer: Tokenizer) -> None:
        window = RouterInputEncoder(word_tokenizer, settings()).encode("", " ".join(WORDS[:40]))
        assert segments(window)[PROMPT_SEGMENTS + 1] == [1, 2, 3, 4, 5, 6]
        assert len(segments(window)) - PROMPT_SEGMENTS == ANSWER_SEGMENTS

    def test_reads_a_huge_text_by_its_ends_only(self, word_tokenizer: Tokenizer) -> None:
        reader = RouterInputEncoder(word_tokenizer, settings())
        huge = "w1 " + "? " * 1_000_000 + "w2"
        window = reader.encode(huge, huge)
        assert (asked(window)[0], asked(window)[-1], segments(window)[-1][-1]) == (2, 3, 3)


@pytest.fixture
def folder(tiny_router: Path, tmp_path: Path) -> Path:
    """A router folder that a test may damage."""
    return Path(shutil.copytree(tiny_router, tmp_path / "router"))


@pytest.fixture(scope="module")
def exported(
    tiny_router: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RouterSettings]:
    out = tmp_path_factory.mktemp("exported")
    return out, export_router(tiny_router, out).settings


@pytest.fixture(scope="module")
def router(exported: tuple[Path, RouterSettings]) -> Router:
    return load(*exported)


def load(folder: Path, found: RouterSettings) -> Router:
    return Router(
        (folder / "router.onnx").read_bytes(),
        head_from_bytes((folder / "router_head.safetensors").read_bytes()),
        Tokenizer.from_file(str(folder / "router_tokenizer.json")),
        found,
    )


def some_head(rows: int) -> RouterHead:
    return RouterHead(
        np.zeros((rows, WIDTH), np.float32),
        np.zeros(rows, np.float32),
        np.zeros((0, WIDTH), np.float16),
        np.zeros(0, np.int64),
    )


class TestExport:
    def test_graph_computes_what_torch_does(self) -> None:
        torch.manual_seed(0)
        network = RouterMLP(40, 5).eval()
        network.half().float()
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 39, (6, 30))
        ids[:, [8, 9, 20]] = 39
        session = onnx_session(build_graph(network))
        (found,) = session.run(["features"], {"input_ids": ids})
        with torch.no_grad():
            whole = torch.ones(ids.shape, dtype=torch.bool)
            expected = network.features(torch.from_numpy(ids), whole).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())

    def test_routers_of_earlier_releases_have_their_own_widths(self) -> None:
        network = RouterMLP(40, 5, {}).eval()
        assert network.settings == EARLIER
        assert network.mean_scale.shape[0] == 4
        session = onnx_session(build_graph(network))
        (found,) = session.run(["features"], {"input_ids": np.array([[1, 39, 2, 3]])})
        assert found.shape == (1, EARLIER["hidden_3"])

    def test_padding_changes_nothing(self) -> None:
        torch.manual_seed(0)
        network = RouterMLP(40, 5).eval()
        ids = torch.tensor([[1, 2, 39, 3, 39, 39, 4]])
        padded = torch.cat([ids, torch.full((1, 5), 39)], 1)
        mask = torch.arange(12)[None] < 7
        whole = torch.ones_like(ids, dtype=torch.bool)
        torch.testing.assert_close(network(ids, whole), network(padded, mask))

    @pytest.mark.parametrize(
        ("damage", "cause"),
        [
            (shutil.rmtree, "is not a router"),
            (lambda folder: (folder / "router.json").write_text("{"), "is damaged"),
            (lambda folder: (folder / "router.json").write_text("[]"), "is damaged"),
            (lambda folder: edit(folder, format="x"), "does not describe a router"),
            (lambda folder: edit(folder, version=99), "format 99"),
            (lambda folder: edit(folder, architecture="oracle"), "unknown architecture 'oracle'"),
            (lambda folder: edit(folder, settings={}), "is damaged"),
            (lambda folder: edit(folder, vocab_size=3), "was trained with 2"),
            (
                lambda folder: edit_settings(folder, labels=list("abcdef")),
                "do not fit its settings",
            ),
            (lambda folder: edit(folder, min_confidence="high"), "is damaged"),
            (lambda folder: (folder / "head.safetensors").unlink(), "cannot be read"),
            (lambda folder: (folder / "head.safetensors").write_bytes(b"x" * 9), "cannot be read"),
            (lambda folder: edit_settings(folder, labels=["a", "a"]), "labels"),
            (lambda folder: (folder / "router.safetensors").unlink(), "cannot be read"),
            (lambda folder: (folder / "router.safetensors").write_bytes(b"x" * 9), "cannot be"),
            (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
        ],
    )
    def test_refuses_a_bad_folder(
        self, folder: Path, tmp_path: Path, damage: Callable[[Path], object], cause: str
    ) -> None:
        damage(folder)
        with pytest.raises(RouterError, match=cause):
            export_router(folder, tmp_path)

    def test_notices_a_graph_that_differs(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def other_graph(network: RouterMLP) -> onnx.ModelProto:
            changed = RouterMLP(network.separator + 1, network.head.out_features)
            return build_graph(changed)

        monkeypatch.setattr("dlp_edge.export.router.build_graph", other_graph)
        with pytest.raises(RouterError, match="differs from torch"):
            export_router(folder, tmp_path)


def onnx_session(model: onnx.ModelProto) -> Any:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def edit(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "router.json").read_text())
    (folder / "router.json").write_text(json.dumps({**card, **changes}))


def edit_settings(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "router.json").read_text())
    edit(folder, settings={**card["settings"], **changes})


class TestRouter:
    def test_picks_the_task(self, router: Router) -> None:
        y = router.classify("Tom has 12 apples and buys 7. How many?").probabilities
        assert max(y, key=lambda name: y[name]) == "sums"
        assert router.labels == tuple(y) == ("email", "sql", "sums")

    def test_follows_the_answer(self, router: Router) -> None:
        prompt = "Write an email to Ann about day 9\nTom has 3 apples and buys 3. How many?"
        for generated, expected in (
            ("Dear friend, it is late. Kind", "email"),
            ("Dear friend, it is late. Kind regards.\nHe", "sums"),
        ):
            y = router.classify(prompt, generated).probabilities
            assert max(y, key=lambda name: y[name]) == expected

    def test_what_is_asked_first_leads(self, router: Router) -> None:
        asked_for = {
            "email": "Write an email to Ann about day 9, and tell her that it is the day of days.",
            "sums": "Tom has 13 apples and buys 13 more of them at the shop. How many has he now?",
        }
        for first, second in (("email", "sums"), ("sums", "email")):
            y = router.classify(f"{asked_for[first]}\n{asked_for[second]}").probabilities
            assert max(y, key=lambda name: y[name]) == first

    @pytest.mark.parametrize(
        ("shares", "begun", "doubt", "expected"),
        [
            ([0.5, 0.4, 0.1], [[0.1, 0.9, 0.0]], 0.0, [0.4, 0.5, 0.1]),
            ([0.5, 0.4, 0.1], [[0.4, 0.6, 0.0], [0.1, 0.9, 0.0]], 0.0, [0.4, 0.5, 0.1]),
            ([0.5, 0.4, 0.1], [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]], 0.0, [0.5, 0.4, 0.1]),
            ([0.62, 0.04, 0.34], [[0.1, 0.9, 0.0]], 0.0, [0.62, 0.04, 0.34]),  # not likely enough
            (
                [0.5, 0.4, 0.1],
                [[0.25, 0.75, 0.0]],
                0.0,
                [0.5, 0.4, 0.1],
            ),  # the beginning is unclear
            ([0.5, 0.4, 0.1], [[0.1, 0.9, 0.0]], 0.5, [0.5, 0.4, 0.1]),  # or nobody's
            ([0.06, 0.93, 0.01], [[0.9, 0.1, 0.0]], 0.0, [0.06, 0.93, 0.01]),  # sure enough
        ],
    )
    def test_only_a_likely_skill_that_clearly_begins_takes_the_lead(
        self,
        router: Router,
        monkeypatch: pytest.MonkeyPatch,
        shares: list[float],
        begun: list[list[float]],
        doubt: float,
        expected: list[float],
    ) -> None:
        looks = [*begun, *[begun[-1]] * (len(PREFIX_LENGTHS) - len(begun))]
        read = iter([(np.array(shares), 0.0), *((np.array(look), doubt) for look in looks)])
        monkeypatch.setattr(router, "_shares", lambda window: next(read))
        assert list(router.classify("any text").probabilities.values()) == expected

    @given(prompt=st.text(max_size=400), generated=st.text(max_size=400))
    def test_probabilities_sum_to_one(self, router: Router, prompt: str, generated: str) -> None:
        found = router.classify(prompt, generated)
        assert math.isclose(sum(found.probabilities.values()), 1, abs_tol=1e-12)
        assert 0 <= found.doubt <= 1

    def test_temperature_softens(
        self, exported: tuple[Path, RouterSettings], router: Router
    ) -> None:
        folder, found = exported
        soft = load(folder, replace(found, temperature=4.0))
        prompt = "Tom has 12 apples and buys 7. How many?"
        assert max(soft.classify(prompt).probabilities.values()) < max(
            router.classify(prompt).probabilities.values()
        )

    @pytest.mark.parametrize(
        "text",
        [
            "for (int i = 0; i < n; i++) { free(list[i]); }",
            "Melt the butter, stir in the flour and let the sauce simmer for ten minutes.",
            "Je voudrais savoir à quelle heure ouvre la bibliothèque demain matin.",
            "xqz kkjw 0x9f %%% ~~ lqp",
        ],
    )
    def test_doubts_text_of_no_task(self, router: Router, text: str) -> None:
        assert router.classify(text).doubt > 0.5  # more likely nobody's than anybody's

    @pytest.mark.parametrize(
        ("changes", "cause"),
        [
            ({"labels": ("a", "a", "b")}, "labels"),
            ({"labels": tuple("abcdef")}, "4 outputs for 6 labels"),
            ({"prompt_tokens": 0}, "reads 0"),
            ({"generated_tokens": 16}, "reads 10 . 16"),
            ({"prompt_tokens": MAX_ROUTER_INPUT}, "reads 256"),
            ({"temperature": 0.0}, "temperature"),
            ({"temperature": math.nan}, "temperature"),
        ],
    )
    def test_refuses_settings_that_do_not_fit(
        self, exported: tuple[Path, RouterSettings], changes: dict[str, Any], cause: str
    ) -> None:
        with pytest.raises(RouterError, match=cause):
            load(exported[0], settings(**changes))

    def test_refuses_a_model_that_does_not_load(self, word_tokenizer: Tokenizer) -> None:
        with pytest.raises(RouterError, match="cannot load the router's model"):
            Router(b"no graph", some_head(4), word_tokenizer, settings())

    def test_refuses_another_routers_tokenizer(self) -> None:
        vocabulary = {f"w{i}": i for i in range(100)}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
        model = build_graph(RouterMLP(20, 3)).SerializeToString()
        with pytest.raises(RouterError, match="failed to run"):
            Router(model, some_head(4), tokenizer, settings())

    def test_refuses_another_routers_last_layer(self, word_tokenizer: Tokenizer) -> None:
        model = build_graph(RouterMLP(SEPARATOR + 1, 4)).SerializeToString()
        head = RouterHead(
            np.zeros((4, 7), np.float32),
            np.zeros(4, np.float32),
            np.zeros((0, 7), np.float16),
            np.zeros(0, np.int64),
        )
        with pytest.raises(RouterError, match=f"{WIDTH} features, its last layer expects 7"):
            Router(model, head, word_tokenizer, settings())

    def test_refuses_output_that_is_not_finite(self, word_tokenizer: Tokenizer) -> None:
        model = build_graph(RouterMLP(SEPARATOR + 1, 3))
        for weight in model.graph.initializer:
            if weight.name == "bias_0_half":
                weight.CopyFrom(
                    numpy_helper.from_array(
                        np.full(BASE["hidden_1"], np.nan, np.float16), weight.name
                    )
                )
        with pytest.raises(RouterError, match="not finite"):
            Router(model.SerializeToString(), some_head(4), word_tokenizer, settings())
