"""The request splitter's training and export."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dlp_edge.bundle.graph_allowlist import check_splitter
from dlp_edge.errors import RouterError
from dlp_edge.export.graphs import splitter as splitter_export
from dlp_edge.export.router import export_router
from dlp_edge.models.router_folder import SPLITTER, read_router
from dlp_edge.models.router_tokenizer import train_tokenizer
from dlp_edge.models.splitter.composites import CompositeMaker
from dlp_edge.models.splitter.crf import LogPartition
from dlp_edge.models.splitter.joins import HELD_OUT_JOINS, draw_frame
from dlp_edge.models.splitter.measuring import split_by
from dlp_edge.models.splitter.network import SplitterNetwork
from dlp_edge.models.splitter.training import train_splitter
from dlp_edge.models.tasks import read_tasks
from dlp_edge.runtime.routing.request_splitter import RequestSplitter

pytestmark = pytest.mark.slow

GLUE, KINDS = 2, 4


def test_the_partition_function_and_its_gradient() -> None:
    """Against the sum over all segmentations, by autograd."""
    torch.manual_seed(0)
    shapes = ((2, 5, KINDS), (2, 5), (2, 5))
    fits, starts, glue_starts = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes
    )
    mask = torch.ones(2, 5, dtype=torch.float64)
    mask[1, 4] = 0

    def brute(row: int, length: int) -> Tensor:
        totals = []
        for kinds in itertools.product(range(KINDS), repeat=length):
            for entered in itertools.product((False, True), repeat=length - 1):
                total = fits[row, 0, kinds[0]]
                for at in range(1, length):
                    same = kinds[at] == kinds[at - 1]
                    if same == entered[at - 1] and (not same or kinds[at] == GLUE):
                        break
                    if entered[at - 1]:
                        total = total + (glue_starts if kinds[at] == GLUE else starts)[row, at]
                    total = total + fits[row, at, kinds[at]]
                else:
                    totals.append(total)
        return torch.stack(totals).logsumexp(0)

    expected = torch.stack([brute(0, 5), brute(1, 4)])
    actual = LogPartition.apply(fits, starts, glue_starts, mask, GLUE)
    assert torch.allclose(actual, expected)
    inputs = (fits, starts, glue_starts)
    wanted = torch.autograd.grad((expected * torch.tensor([1.0, 2.0])).sum(), inputs)
    found = torch.autograd.grad((actual * torch.tensor([1.0, 2.0])).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other)


def test_composites_hold_their_requests(tiny_tasks: Path) -> None:
    maker = CompositeMaker(read_tasks(tiny_tasks), "train", random.Random(0))
    for _ in range(300):
        composite = maker.make()
        spans = composite.spans
        assert 1 <= len(spans) <= 6
        assert all(composite.text[span.start : span.end].strip() for span in spans)
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
        assert not spans[0].leans


def test_held_out_joins_are_not_taught() -> None:
    rng = random.Random(0)
    taught = {text for _ in range(3000) for text in draw_frame(3, rng).before}
    assert taught.isdisjoint(HELD_OUT_JOINS)


def test_the_same_seed_gives_the_same_splitter(tiny_tasks: Path) -> None:
    tasks = read_tasks(tiny_tasks)
    tokenizer = train_tokenizer(tasks)
    one, other = (train_splitter(tasks, tokenizer, 0, lambda done: None, None, 48) for _ in "ab")
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_graph_splits_as_the_network(tiny_router: Path, tmp_path: Path) -> None:
    """A router folder keeps the splitter, and the exported one finds what torch finds."""
    folder = read_router(tiny_router)
    assert folder.splitter is not None
    entry = export_router(tiny_router, tmp_path)
    assert entry.splitter
    model = (tmp_path / "request_splitter.onnx").read_bytes()
    check_splitter(model)
    splitter = RequestSplitter(model, folder.tokenizer)
    for text in ("How many apples are 3 and 4?\nAnd then mail Ann.", "Hello there", "a\n" * 300):
        assert splitter.split(text) == split_by(folder.splitter, folder.tokenizer, text)
    assert len(splitter.split(" \n").requests) == 1
    assert len(splitter.split("word " * 5_000).requests) == 1  # too long: a document


def test_a_router_of_an_earlier_release_has_none(tiny_router: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in tiny_router.iterdir():
        if path.name != SPLITTER:
            (old / path.name).write_bytes(path.read_bytes())
    (tmp_path / "out").mkdir()
    assert not export_router(old, tmp_path / "out").splitter
    assert not (tmp_path / "out" / "request_splitter.onnx").exists()


def test_damaged_splitters_are_refused(
    tiny_router: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = read_router(tiny_router)
    monkeypatch.setattr(splitter_export, "TOLERANCE", -1.0)
    with pytest.raises(RouterError, match="differs from torch"):
        export_router(tiny_router, tmp_path)
    with pytest.raises(RouterError, match="request splitter's model failed"):
        RequestSplitter(b"no model", folder.tokenizer)
    network = SplitterNetwork(folder.tokenizer.get_vocab_size(), 3)
    network.last.bias.data[0] = float("nan")
    model = splitter_export.build_graph(network).SerializeToString()
    with pytest.raises(ValueError, match="not finite"):
        check_splitter(model)
    with pytest.raises(RouterError, match="not finite"):
        RequestSplitter(model, folder.tokenizer)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in tiny_router.iterdir():
        data = path.read_bytes()
        (damaged / path.name).write_bytes(data[:100] if path.name == SPLITTER else data)
    with pytest.raises(RouterError, match=SPLITTER):
        read_router(damaged)


def test_scores_of_padding_change_nothing() -> None:
    """A prompt's scores do not depend on the longer ones of its batch."""
    torch.manual_seed(0)
    network = SplitterNetwork(50, 2).eval()
    ids = torch.randint(0, 50, (1, 7))
    with torch.no_grad():
        alone = network(ids, torch.zeros_like(ids), torch.ones(1, 7))
        padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.int64)], 1)
        mask = (torch.arange(16) < 7).float()[None]
        beside = network(padded, torch.zeros_like(padded), mask)[:, :7]
    assert np.allclose(alone, beside, atol=1e-5)
