"""The ALBERT router, with a small configuration: training, pretrained weights, its graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AlbertConfig, AlbertModel

from dlp_edge.bundle.router_head import head_from_bytes
from dlp_edge.errors import RouterError, UsageError
from dlp_edge.export.router import export_router
from dlp_edge.models.networks import router_albert
from dlp_edge.models.networks.router_albert import RouterAlbert
from dlp_edge.models.training import Recipe, train_router
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.routing.router_input import RouterInputEncoder

pytestmark = pytest.mark.slow

SMALL = {
    "embedding_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture(scope="module")
def trained(tiny_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("albert") / "router"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_albert, "BASE", SMALL)
        quick = Recipe(batch=32, rounds=12, learning_rate=2e-3, weight_decay=0.01)
        patch.setattr("dlp_edge.models.training.RECIPES", {"albert": quick})
        train_router(tiny_tasks, out, arch="albert")
    return out


def test_serves_through_the_same_interface_as_the_mlp(trained: Path, tmp_path: Path) -> None:
    card = json.loads((trained / "router.json").read_text())
    assert card["architecture"] == "albert"
    assert card["network"] == SMALL
    entry = export_router(trained, tmp_path)
    router = Router(
        (tmp_path / "router.onnx").read_bytes(),
        head_from_bytes((tmp_path / "router_head.safetensors").read_bytes()),
        Tokenizer.from_file(str(tmp_path / "router_tokenizer.json")),
        entry.settings,
    )
    found = router.classify("Tom has 12 apples and buys 7. How many?")
    assert tuple(found.probabilities) == router.labels == ("email", "sql", "sums")
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert 0 <= found.doubt <= 1


def test_graph_reads_windows_of_any_length(trained: Path, tmp_path: Path) -> None:
    import onnxruntime

    from dlp_edge.export.router import _load_network
    from dlp_edge.models.router_folder import read_router

    export_router(trained, tmp_path)
    folder = read_router(trained)
    network = _load_network(folder, trained)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "router.onnx"), providers=["CPUExecutionProvider"]
    )
    reader = RouterInputEncoder(folder.tokenizer, folder.card.settings)
    for prompt, generated in (("", ""), ("Select it", ""), ("How many? " * 60, "One.\nTwo " * 40)):
        ids = np.array([reader.encode(prompt, generated)], np.int64)
        (found,) = session.run(["features"], {"input_ids": ids})
        with torch.no_grad():
            whole = torch.ones(ids.shape, dtype=torch.bool)
            expected = network.features(torch.from_numpy(ids), whole).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    network = RouterAlbert(40, 3, SMALL).eval()
    ids = torch.tensor([[1, 2, 39, 3, 39, 39, 4]])
    padded = torch.cat([ids, torch.zeros((1, 5), dtype=torch.int64)], 1)
    mask = torch.arange(12)[None] < 7
    whole = torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(network(ids, whole), network(padded, mask), atol=1e-5, rtol=1e-4)


def test_begins_from_pretrained_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pretrained = AlbertModel(AlbertConfig(vocab_size=39, **SMALL))
    pretrained.save_pretrained(tmp_path / "albert")
    network = RouterAlbert(40, 3, SMALL)
    network.take_weights(tmp_path / "albert")
    own, given = network.body.state_dict(), pretrained.state_dict()
    for name, value in given.items():
        assert torch.equal(own[name][: len(value)] if value.ndim else own[name], value), name


@pytest.mark.parametrize(
    ("vocab_size", "changes", "cause"),
    [(30, {}, "has 30 pieces, the tokenizer 39"), (39, {"hidden_size": 64}, "another shape")],
)
def test_refuses_weights_that_do_not_fit(
    tmp_path: Path, vocab_size: int, changes: dict[str, int], cause: str
) -> None:
    other = AlbertModel(AlbertConfig(vocab_size=vocab_size, **{**SMALL, **changes}))
    other.save_pretrained(tmp_path / "albert")
    with pytest.raises(RouterError, match=cause):
        RouterAlbert(40, 3, SMALL).take_weights(tmp_path / "albert")


def test_refuses_what_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="cannot be read"):
        RouterAlbert(40, 3, SMALL).take_weights(tmp_path)


def test_the_command_line_names_options_that_do_not_fit(tiny_tasks: Path, tmp_path: Path) -> None:
    import argparse

    from dlp_edge.cli.verbs import train_router as verb

    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    words = ["train-router", str(tiny_tasks), "-o", str(tmp_path / "r")]
    for more in (["--pretrained", "x"], ["--max-examples", "0"]):
        with pytest.raises(UsageError):
            verb.run(parser.parse_args([*words, *more]))
