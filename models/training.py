"""`train_router`: task folders in, a router folder out."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dlp_edge.manifest import RouterSettings
from dlp_edge.models.router_examples import (
    Example,
    HeldOut,
    held_out_examples,
    training_examples,
)
from dlp_edge.models.router_folder import (
    RouterAccuracy,
    RouterReport,
    is_router_folder,
    write_router,
)
from dlp_edge.models.router_mlp import RouterMLP
from dlp_edge.models.router_tokenizer import open_tokenizer, train_tokenizer
from dlp_edge.models.tasks import read_tasks
from dlp_edge.runtime.router import WindowReader
from dlp_edge.writer import check_target, staged

Progress = Callable[[str, float], None]

PROMPT_TOKENS = 128
GENERATED_TOKENS = 32
BATCH = 128
EPOCHS = 3
LEAST_STEPS = 120  # small task sets go round more often
PATIENCE = 2  # epochs without a better loss on the held-out examples
LEARNING_RATE = 2e-3
BUCKET = 16 * BATCH  # examples that are sorted by length together, for less padding
# The held-out loss chooses among these. Below 1 would make a router that is sure of what it has
# seen even surer of what it has not.
TEMPERATURES = tuple(round(1.05**step, 3) for step in range(34))  # 1 to 5


def train_router(
    tasks: Path,
    out: Path,
    tokenizer: str | Path | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> RouterReport:
    """Trains a mini-MLP router and writes its folder.

    Args:
        tasks: TASKS/NAME/train.jsonl and dev.jsonl, NAME being the adapter's name.
        out: the folder to write; an existing router is replaced when the new one is whole.
        tokenizer: None trains one on the tasks' texts; or a tokenizer.json, a folder that holds
            one, or what transformers can read (a folder, a hub id).
        seed: the same seed gives the same router on the same machine.
        on_progress: called with (step, fraction).

    Raises:
        RouterError: the tasks or the tokenizer cannot be used.
        UsageError: `out` exists and is no router.
    """
    begun = time.perf_counter()
    tell = on_progress or (lambda step, fraction: None)
    check_target(out, is_router_folder)
    tell("reading the tasks", 0.0)
    found = read_tasks(tasks)
    tell("preparing the tokenizer", 0.02)
    pieces = train_tokenizer(found) if tokenizer is None else open_tokenizer(tokenizer)
    labels = tuple(task.name for task in found)
    settings = RouterSettings(labels, PROMPT_TOKENS, GENERATED_TOKENS, temperature=1.0)
    reader = WindowReader(pieces, settings)

    tell("making examples", 0.05)
    rng = random.Random(seed)
    training = _Windows(training_examples(found, rng), reader, len(labels))
    held_out = _HeldOutWindows(held_out_examples(found, rng), reader, len(labels))
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RouterMLP(pieces.get_vocab_size() + 1, len(labels))
        _fit(model, training, held_out, rng, lambda done: tell("training", 0.15 + 0.8 * done))
        tell("measuring", 0.95)
        model.half().float()  # measured as it is stored
        report = RouterReport(
            architecture="mlp",
            settings=replace(settings, temperature=_best_temperature(model, held_out)),
            vocab_size=pieces.get_vocab_size() + 1,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            accuracy=held_out.accuracy(model),
            examples=len(training),
            seconds=round(time.perf_counter() - begun, 1),
            seed=seed,
        )
    with staged(out, is_router_folder) as staging:
        write_router(staging, report, model.state_dict(), pieces)
    tell("done", 1.0)
    return report


class _Windows:
    """Examples as the network reads them: windows of ids, and targets [n, N] that sum to 1."""

    def __init__(self, examples: Sequence[Example], reader: WindowReader, num_labels: int) -> None:
        self.ids = [
            torch.tensor(reader.window(example.prompt, example.generated)) for example in examples
        ]
        self.targets = torch.zeros(len(examples), num_labels)
        for row, example in enumerate(examples):
            self.targets[row, list(example.labels)] = 1 / len(example.labels)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """input_ids [B, L] int64 and mask [B, L] bool of some examples."""
        ids = torch.nn.utils.rnn.pad_sequence(
            [self.ids[row] for row in rows], batch_first=True, padding_value=-1
        )
        return ids.clamp(min=0), ids >= 0

    def shuffled(self, rng: random.Random) -> Iterator[list[int]]:
        """Batches of rows of about equal lengths, in random order."""
        order = rng.sample(range(len(self)), len(self))
        batches: list[list[int]] = []
        for start in range(0, len(order), BUCKET):
            bucket = sorted(order[start : start + BUCKET], key=lambda row: len(self.ids[row]))
            batches += [bucket[i : i + BATCH] for i in range(0, len(bucket), BATCH)]
        rng.shuffle(batches)
        return iter(batches)

    def logits(self, model: RouterMLP) -> Tensor:
        """[n, N], without dropout."""
        model.eval()
        order = sorted(range(len(self)), key=lambda row: len(self.ids[row]))
        logits = torch.empty_like(self.targets)
        with torch.no_grad():
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                logits[rows] = model(*self.batch(rows))
        return logits

    def accuracy(self, model: RouterMLP) -> float | None:
        if not len(self):
            return None
        hits = self.logits(model).argmax(1) == self.targets.argmax(1)
        return round(hits.float().mean().item(), 4)


class _HeldOutWindows:
    """The held-out examples by kind, and all of them."""

    def __init__(self, held_out: HeldOut, reader: WindowReader, num_labels: int) -> None:
        self.prompts = _Windows(held_out.prompts, reader, num_labels)
        self.bare_prompts = _Windows(held_out.bare_prompts, reader, num_labels)
        self.blends = _Windows(held_out.blends, reader, num_labels)
        self.sentences = _Windows(held_out.sentences, reader, num_labels)

    def logits(self, model: RouterMLP) -> tuple[Tensor, Tensor]:
        """Logits and targets, [n, N] each, of all kinds."""
        kinds = (self.prompts, self.bare_prompts, self.blends, self.sentences)
        return (
            torch.cat([kind.logits(model) for kind in kinds]),
            torch.cat([kind.targets for kind in kinds]),
        )

    def accuracy(self, model: RouterMLP) -> RouterAccuracy:
        return RouterAccuracy(
            prompts=self.prompts.accuracy(model),
            bare_prompts=self.bare_prompts.accuracy(model),
            sentences=self.sentences.accuracy(model),
        )


def _fit(
    model: RouterMLP,
    training: _Windows,
    held_out: _HeldOutWindows,
    rng: random.Random,
    tell: Callable[[float], None],
) -> None:
    """AdamW under a one-cycle rate; leaves the state of the best epoch in the model."""
    steps_per_epoch = math.ceil(len(training) / BATCH)
    epochs = max(EPOCHS, math.ceil(LEAST_STEPS / steps_per_epoch))
    steps = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    best_loss, best_epoch, best_state = math.inf, 0, model.state_dict()
    done = 0
    for epoch in range(epochs):
        model.train()
        for rows in training.shuffled(rng):
            loss = functional.cross_entropy(model(*training.batch(rows)), training.targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            tell(done / steps)
        held_out_loss = functional.cross_entropy(*held_out.logits(model)).item()
        if held_out_loss < best_loss:
            best_loss, best_epoch = held_out_loss, epoch
            best_state = copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= PATIENCE:
            break
    model.load_state_dict(best_state)


def _best_temperature(model: RouterMLP, held_out: _HeldOutWindows) -> float:
    logits, targets = held_out.logits(model)

    def loss(temperature: float) -> float:
        return functional.cross_entropy(logits / temperature, targets).item()

    return min(TEMPERATURES, key=loss)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The matrices are small: a second thread gains little, costs much where the cores are busy,
    and changes the rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
