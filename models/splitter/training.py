"""Trains the request splitter on composites of the tasks' own prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from dlp_edge.models.fitting import WORKERS
from dlp_edge.models.splitter.composites import Composite, CompositeMaker
from dlp_edge.models.splitter.crf import LogPartition
from dlp_edge.models.splitter.network import SplitterNetwork
from dlp_edge.models.tasks import Task
from dlp_edge.runtime.routing.request_splitter import SEGMENT_KINDS
from dlp_edge.runtime.routing.splitter_input import splitter_input

STEPS = 2000
BATCH = 16  # windows
POOL = 16  # batches whose windows are sorted by length together, for less padding
WINDOW = 256  # tokens; prompts are longer, but what decides is near
LEAST_AROUND = 64  # tokens of a window before and after the start that it is chosen for
CHOSEN_SHARE = 0.8  # of the windows hold a start
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
NOISE_SHARES = (0.0, 0.03, 0.08)  # of a batch's tokens become others
SPREAD = 0.5  # of new embeddings
TOKEN_WEIGHT, SEGMENTATION_WEIGHT = 0.5, 0.2
LEANING_FACTOR = 3.0  # of the tokens that lean; few do
START_COST = 1.5  # a request too many does more harm than one too few
UNKNOWN = -100


@dataclass(frozen=True)
class _Window:
    """Up to WINDOW tokens of a composite, each [L].

    Attributes:
        kinds: index of the kind of segment; UNKNOWN where any task fits.
        starts: 1 where a request or an introduction starts, but for the prompt's first.
        leans: 1 in requests that lean on another, 0 in others, -1 elsewhere.
    """

    ids: npt.NDArray[np.int64]
    gaps: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int64]
    starts: npt.NDArray[np.float32]
    leans: npt.NDArray[np.float32]


def train_splitter(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    seed: int,
    on_progress: Callable[[float], None],
    embedding: Tensor | None = None,
    max_examples: int | None = None,
) -> SplitterNetwork:
    """A request splitter for the tasks.

    Args:
        tokenizer: the router's.
        embedding: its rows to begin from, [V, EMBEDDING].
        max_examples: composites at most; None is STEPS batches of them.
    """
    steps = STEPS if max_examples is None else max(1, min(STEPS, max_examples // BATCH))
    torch.manual_seed(seed)
    network = SplitterNetwork(tokenizer.get_vocab_size(), len(tasks))
    if embedding is None:
        torch.nn.init.normal_(network.embedding.weight, std=SPREAD)
    else:
        network.embedding.weight.data[:] = embedding * (SPREAD / embedding.std())
    windows = _Windows(tasks, tokenizer, random.Random(seed))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    parameters = list(network.parameters())

    def gradients(part: list[_Window], draw: int) -> tuple[Tensor, ...]:
        noise = torch.Generator().manual_seed(draw)
        loss = _loss(network, part, len(tasks), noise) * (len(part) / BATCH)
        return torch.autograd.grad(loss, parameters)

    network.train()
    with ThreadPoolExecutor(WORKERS) as workers:
        for step in range(steps):
            batch = windows.batch()
            parts = [part for at in range(WORKERS) if (part := batch[at::WORKERS])]
            draws = [seed * 1_000_003 + WORKERS * step + at for at in range(len(parts))]
            found = list(workers.map(gradients, parts, draws))
            for parameter, *some in zip(parameters, *found, strict=True):
                parameter.grad = sum(some[1:], some[0])
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            on_progress((step + 1) / steps)
    with torch.no_grad():
        network.last.bias[len(tasks) + SEGMENT_KINDS] -= START_COST
    return network.half().float().eval()  # as it is stored


class _Windows:
    """Windows of composites that are made as they are needed."""

    def __init__(self, tasks: Sequence[Task], tokenizer: Tokenizer, rng: random.Random) -> None:
        self._maker = CompositeMaker(tasks, "train", rng)
        self._tokenizer = tokenizer
        self._rng = rng
        self._num_tasks = len(tasks)
        self._batches: list[list[_Window]] = []

    def batch(self) -> list[_Window]:
        if not self._batches:
            self._batches = self._make()
        return self._batches.pop()

    def _make(self) -> list[list[_Window]]:
        composites = [self._maker.make() for _ in range(POOL * BATCH)]
        encoded = self._tokenizer.encode_batch(
            [composite.text for composite in composites], add_special_tokens=False
        )
        windows = []
        for composite, encoding in zip(composites, encoded, strict=True):
            tokens = splitter_input(composite.text, encoding)
            if len(tokens.ids):
                whole = _Window(
                    tokens.ids, tokens.gaps, *_targets(composite, tokens.starts, self._num_tasks)
                )
                windows.append(self._cut(self._with_noise(whole)))
        windows.sort(key=lambda window: len(window.ids))
        batches = [windows[at : at + BATCH] for at in range(0, len(windows), BATCH)]
        self._rng.shuffle(batches)
        return batches

    def _with_noise(self, window: _Window) -> _Window:
        noise = np.random.default_rng(self._rng.getrandbits(32))
        changed = noise.random(len(window.ids)) < self._rng.choice(NOISE_SHARES)
        others = noise.integers(0, self._tokenizer.get_vocab_size(), len(window.ids))
        ids = np.where(changed, others, window.ids)
        return _Window(ids, window.gaps, window.kinds, window.starts, window.leans)

    def _cut(self, window: _Window) -> _Window:
        length = len(window.ids)
        if length <= WINDOW:
            return window
        first = self._rng.randrange(length - WINDOW + 1)
        starts = 1 + np.flatnonzero(window.starts[1:])
        if len(starts) and self._rng.random() < CHOSEN_SHARE:
            chosen = int(self._rng.choice(starts.tolist()))
            before = self._rng.randrange(LEAST_AROUND, WINDOW - LEAST_AROUND)
            first = min(max(0, chosen - before), length - WINDOW)
        kept = slice(first, first + WINDOW)
        return _Window(
            window.ids[kept],
            window.gaps[kept],
            window.kinds[kept],
            window.starts[kept],
            window.leans[kept],
        )


def _targets(
    composite: Composite, token_starts: npt.NDArray[np.int64], num_tasks: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Kinds, starts and leans of tokens that start at these characters."""
    glue = num_tasks + 1
    kinds = np.full(len(token_starts), glue, np.int64)
    starts = np.zeros(len(token_starts), np.float32)
    leans = np.full(len(token_starts), -1, np.float32)
    for span in composite.spans:
        first, stop = np.searchsorted(token_starts, (span.start, span.end))
        if first == stop:
            continue
        starts[first] = 1
        if span.is_introduction:
            kinds[first:stop] = glue + 1
        else:
            kinds[first:stop] = UNKNOWN if span.label is None else span.label
            leans[first:stop] = span.leans
    return kinds, starts, leans


def _loss(
    network: SplitterNetwork, windows: Sequence[_Window], num_tasks: int, noise: torch.Generator
) -> Tensor:
    """The negative log likelihood of the segmentations and, so that training begins fast, of the
    tokens' kinds; and that of which requests lean."""
    length = max(len(window.ids) for window in windows)
    glue, kinds = num_tasks + 1, num_tasks + SEGMENT_KINDS

    def padded(arrays: Sequence[npt.NDArray[np.generic]], fill: float) -> Tensor:
        rows = np.full((len(arrays), length), fill, arrays[0].dtype)
        for row, array in zip(rows, arrays, strict=True):
            row[: len(array)] = array
        return torch.from_numpy(rows)

    mask = padded([np.ones(len(window.ids), np.float32) for window in windows], 0)
    wanted = padded([window.kinds for window in windows], UNKNOWN)
    leans = padded([window.leans for window in windows], -1)
    starts = padded([window.starts for window in windows], 0)
    starts[:, 0] = 0  # the first segment's start is given
    is_glue = (wanted == glue) & (mask > 0)
    glue_starts = is_glue.float()
    glue_starts[:, 1:] *= ~is_glue[:, :-1]
    glue_starts[:, 0] = 0

    scores = network(
        padded([window.ids for window in windows], 0),
        padded([window.gaps for window in windows], 0),
        mask,
        noise,
    )
    fits = scores[..., :kinds]
    own = fits.gather(2, wanted.clamp(min=0).unsqueeze(2)).squeeze(2) * (wanted >= 0)
    own = own + scores[..., kinds] * starts + scores[..., kinds + 1] * glue_starts
    path = own.sum(1) + _unknown(fits[..., : num_tasks + 1], wanted, starts, mask)
    log_z = LogPartition.apply(fits, scores[..., kinds], scores[..., kinds + 1], mask, glue)
    tokens = functional.cross_entropy(
        fits.flatten(0, 1), wanted.flatten(), ignore_index=UNKNOWN, reduction="sum"
    ) / (wanted >= 0).sum().clamp(min=1)
    in_requests = (leans >= 0).float()
    leaning = functional.binary_cross_entropy_with_logits(
        scores[..., -1],
        leans.clamp(min=0),
        in_requests,
        reduction="sum",
        pos_weight=torch.tensor(LEANING_FACTOR),
    ) / in_requests.sum().clamp(min=1)
    loss: Tensor = SEGMENTATION_WEIGHT * (log_z - path).mean() + TOKEN_WEIGHT * tokens + leaning
    return loss


def _unknown(fits: Tensor, wanted: Tensor, starts: Tensor, mask: Tensor) -> Tensor:
    """What requests of no known task add to the score of a segmentation: the sum over all tasks
    that may be meant. [B]"""
    unknown = (wanted == UNKNOWN) & (mask > 0)
    added = [fits.new_zeros(()) for _ in range(len(fits))]
    for row in torch.nonzero(unknown.any(1)).flatten().tolist():
        places = torch.nonzero(unknown[row]).flatten().tolist()
        first = places[0]
        for at, following in zip(places, [*places[1:], -1], strict=True):
            if following != at + 1 or starts[row, following] > 0:
                added[row] = added[row] + fits[row, first : at + 1].sum(0).logsumexp(0)
                first = following
    return torch.stack(added)
