"""The optimisation of a router network, reproducible on any number of busy cores."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dlp_edge.models.batches import Windows
from dlp_edge.models.networks.network import RouterNetwork

WORKERS = 2


@dataclass(frozen=True)
class Recipe:
    """How an architecture is trained: AdamW under a one-cycle rate.

    `rounds` of examples are drawn, each anew, and every example is read once.
    """

    batch: int
    rounds: int
    learning_rate: float
    weight_decay: float


def fit(
    model: RouterNetwork,
    training: Windows,
    recipe: Recipe,
    seed: int,
    tell: Callable[[float], None],
) -> None:
    """Each of WORKERS threads takes a part of every batch; the parts are fixed and their
    gradients are added in a fixed order, so the router does not depend on how busy the cores are.
    (torch's own threads do: they split sums by their number, and wait for each other by spinning.)
    """
    steps = math.ceil(len(training) / recipe.batch)
    optimizers = [
        torch.optim.AdamW(group, lr=recipe.learning_rate, fused=True)
        for group in _parameter_groups(model, recipe.weight_decay)
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
        for optimizer in optimizers
    ]
    order = random.Random(seed)
    parameters = list(model.parameters())

    def gradients(rows: Sequence[int], share: float, draw: int) -> tuple[Tensor, ...]:
        batch = training.batch(rows, np.random.default_rng(draw))
        noise = torch.Generator().manual_seed(draw)
        loss = functional.cross_entropy(model(*batch, noise), training.targets[rows]) * share
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    model.train()
    done = 0
    with ThreadPoolExecutor(WORKERS) as workers:
        for rows in training.shuffled(recipe.batch, order):
            parts = [part for at in range(WORKERS) if (part := rows[at::WORKERS])]
            shares = [len(part) / len(rows) for part in parts]
            draws = [seed * 1_000_003 + WORKERS * done + at for at in range(len(parts))]
            found = list(workers.map(gradients, parts, shares, draws))
            for parameter, *some in zip(parameters, *found, strict=True):
                given = [gradient for gradient in some if gradient is not None]
                parameter.grad = sum(given[1:], given[0]) if given else None
            list(workers.map(lambda optimizer: optimizer.step(), optimizers))
            for schedule in schedules:
                schedule.step()
            done += 1
            tell(done / steps)


def _parameter_groups(model: RouterNetwork, decay: float) -> list[list[dict[str, Any]]]:
    """Of the embedding, which is most of the work, and of all else; rarities do not decay."""
    named = dict(model.named_parameters())
    embedding = [name for name in named if name.startswith("embedding")]
    rarity = [name for name in named if name == "rarity"]
    others = [name for name in named if name not in (*embedding, *rarity)]
    groups = [[(embedding, decay)], [(others, decay), (rarity, 0.0)]]
    return [
        [
            {"params": [named[name] for name in names], "weight_decay": each}
            for names, each in group
            if names
        ]
        for group in groups
        if group[0][0]
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread in each of torch's operations: where matrices are small, several wait for each
    other, many times longer on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
