"""The router at run time: its windows, its export, its probabilities."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
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

from dlp_edge.errors import RouterError
from dlp_edge.export.router import build_graph, export_router
from dlp_edge.manifest import RouterSettings
from dlp_edge.models.router_mlp import RouterMLP
from dlp_edge.runtime.router import MAX_WINDOW, Router, WindowReader

WORDS = [f"w{i}" for i in range(50)]
SEPARATOR = len(WORDS) + 1
LABELS = ("a", "b", "c")


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
            "generated_tokens": 6,
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


class TestWindow:
    @given(prompt=texts, generated=texts)
    def test_never_exceeds_its_limits(
        self, word_tokenizer: Tokenizer, prompt: str, generated: str
    ) -> None:
        window = WindowReader(word_tokenizer, settings()).window(prompt, generated)
        asked, *answered = segments(window)
        assert len(answered) == 3
        assert len(asked) <= 10
        assert sum(map(len, answered)) <= 6

    @given(prompt=texts, generated=texts)
    def test_ends_with_the_last_generated_token(
        self, word_tokenizer: Tokenizer, prompt: str, generated: str
    ) -> None:
        window = WindowReader(word_tokenizer, settings()).window(prompt, generated)
        ids = word_tokenizer.encode(generated.rstrip()).ids
        assert segments(window)[-1][-1:] == ids[-1:]

    def test_keeps_head_and_tail_of_a_long_prompt(self, word_tokenizer: Tokenizer) -> None:
        asked = segments(WindowReader(word_tokenizer, settings()).window(" ".join(WORDS), ""))[0]
        assert asked == [1, 2, 3, 4, 5, 46, 47, 48, 49, 50]

    def test_keeps_apart_earlier_lines_the_running_line_and_its_last_tokens(
        self, word_tokenizer: Tokenizer
    ) -> None:
        reader = WindowReader(word_tokenizer, settings())
        assert segments(reader.window("w0", "w1 w2\nw3 w4 w5")) == [[1], [2, 3], [4], [5, 6]]
        assert segments(reader.window("w0", "w1 w2\nw3\n")) == [[1], [2, 3], [], [4]]
        assert segments(reader.window("", "")) == [[], [], [], []]

    def test_reads_a_huge_text_by_its_ends_only(self, word_tokenizer: Tokenizer) -> None:
        reader = WindowReader(word_tokenizer, settings())
        huge = "w1 " + "? " * 1_000_000 + "w2"
        asked = segments(reader.window(huge, huge))
        assert (asked[0][0], asked[0][-1], asked[3][-1]) == (2, 3, 3)


@pytest.fixture
def folder(tiny_router: Path, tmp_path: Path) -> Path:
    """A router folder that a test may damage."""
    return Path(shutil.copytree(tiny_router, tmp_path / "router"))


@pytest.fixture(scope="module")
def exported(
    tiny_router: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RouterSettings]:
    out = tmp_path_factory.mktemp("exported")
    return out, export_router(tiny_router, out)[1]


@pytest.fixture(scope="module")
def router(exported: tuple[Path, RouterSettings]) -> Router:
    folder, found = exported
    tokenizer = Tokenizer.from_file(str(folder / "router_tokenizer.json"))
    return Router((folder / "router.onnx").read_bytes(), tokenizer, found)


class TestExport:
    def test_graph_computes_what_torch_does(self) -> None:
        torch.manual_seed(0)
        network = RouterMLP(40, 5).eval()
        network.half().float()
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 39, (6, 30))
        ids[:, [8, 9, 20]] = 39
        session = onnx_session(build_graph(network))
        (found,) = session.run(["logits"], {"input_ids": ids})
        with torch.no_grad():
            expected = network(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.bool))
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)

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
            (lambda folder: edit_settings(folder, labels=["a"]), "do not fit its settings"),
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
            changed = RouterMLP(network.separator + 1, network.layers[-1].out_features)
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
        y = router.probabilities("Tom has 12 apples and buys 7. How many?")
        assert max(y, key=lambda name: y[name]) == "sums"
        assert router.labels == tuple(y) == ("email", "sql", "sums")

    def test_follows_the_answer(self, router: Router) -> None:
        prompt = "Write an email to Ann about day 9\nTom has 3 apples and buys 3. How many?"
        for generated, expected in (
            ("Dear friend, it is late. Kind", "email"),
            ("Dear friend, it is late. Kind regards.\nHe", "sums"),
        ):
            y = router.probabilities(prompt, generated)
            assert max(y, key=lambda name: y[name]) == expected

    @given(prompt=st.text(max_size=400), generated=st.text(max_size=400))
    def test_probabilities_sum_to_one(self, router: Router, prompt: str, generated: str) -> None:
        y = router.probabilities(prompt, generated)
        assert math.isclose(sum(y.values()), 1, abs_tol=1e-12)

    def test_temperature_softens(
        self, exported: tuple[Path, RouterSettings], router: Router
    ) -> None:
        folder, found = exported
        soft = Router(
            (folder / "router.onnx").read_bytes(),
            Tokenizer.from_file(str(folder / "router_tokenizer.json")),
            settings(
                labels=found.labels,
                prompt_tokens=found.prompt_tokens,
                generated_tokens=found.generated_tokens,
                temperature=4.0,
            ),
        )
        prompt = "Tom has 12 apples and buys 7. How many?"
        assert max(soft.probabilities(prompt).values()) < max(router.probabilities(prompt).values())

    @pytest.mark.parametrize(
        ("changes", "cause"),
        [
            ({"labels": ()}, "labels"),
            ({"labels": ("a", "a", "b")}, "labels"),
            ({"labels": ("a", "b")}, "3 outputs for 2 labels"),
            ({"prompt_tokens": 0}, "reads 0"),
            ({"generated_tokens": 2}, "reads 10 . 2"),
            ({"prompt_tokens": MAX_WINDOW}, "reads 256"),
            ({"temperature": 0.0}, "temperature"),
            ({"temperature": math.nan}, "temperature"),
        ],
    )
    def test_refuses_settings_that_do_not_fit(
        self, exported: tuple[Path, RouterSettings], changes: dict[str, Any], cause: str
    ) -> None:
        folder = exported[0]
        tokenizer = Tokenizer.from_file(str(folder / "router_tokenizer.json"))
        with pytest.raises(RouterError, match=cause):
            Router((folder / "router.onnx").read_bytes(), tokenizer, settings(**changes))

    def test_refuses_a_model_that_does_not_load(self, word_tokenizer: Tokenizer) -> None:
        with pytest.raises(RouterError, match="does not load"):
            Router(b"no graph", word_tokenizer, settings())

    def test_refuses_another_routers_tokenizer(self) -> None:
        vocabulary = {f"w{i}": i for i in range(100)}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
        model = build_graph(RouterMLP(20, 3)).SerializeToString()
        with pytest.raises(RouterError, match="does not run"):
            Router(model, tokenizer, settings())

    def test_refuses_output_that_is_not_finite(self, word_tokenizer: Tokenizer) -> None:
        model = build_graph(RouterMLP(SEPARATOR + 1, 3))
        for weight in model.graph.initializer:
            if weight.name == "bias_3_half":
                weight.CopyFrom(
                    numpy_helper.from_array(np.full(3, np.nan, np.float16), weight.name)
                )
        with pytest.raises(RouterError, match="not finite"):
            Router(model.SerializeToString(), word_tokenizer, settings())
