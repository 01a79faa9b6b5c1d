"""`train_router`: task folders in, a router folder out."""

from __future__ import annotations

import gc
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from dlp_edge.atomic.staging import check_target, staged
from dlp_edge.bundle.manifest import RouterSettings
from dlp_edge.bundle.router_head import RouterHead
from dlp_edge.models.backbone_embeddings import BackboneEmbeddings
from dlp_edge.models.batches import Windows
from dlp_edge.models.confidence_calibration import (
    FOREIGN,
    best_temperature,
    doubt_bias,
    judge,
    least_confidence,
    shifted,
    thresholds,
)
from dlp_edge.models.evaluation import measure
from dlp_edge.models.fitting import WORKERS, Recipe, fit, one_thread
from dlp_edge.models.networks.network import RouterNetwork
from dlp_edge.models.networks.router_mlp import EMBEDDING, SPREAD, RouterMLP
from dlp_edge.models.router_examples import HELD_OUT_COMPOSITES, Example, ExampleMaker
from dlp_edge.models.router_folder import RouterReport, is_router_folder, write_router
from dlp_edge.models.router_report import write_report
from dlp_edge.models.router_tokenizer import open_tokenizer, train_tokenizer
from dlp_edge.models.splitter.measuring import measure_splitter
from dlp_edge.models.splitter.network import EMBEDDING as SPLITTER_EMBEDDING
from dlp_edge.models.splitter.training import train_splitter
from dlp_edge.models.tasks import read_out_of_scope, read_tasks
from dlp_edge.models.training_texts.out_of_scope import random_pieces
from dlp_edge.runtime.adapters.fit_router_row import KEPT_FEATURES
from dlp_edge.runtime.routing.router_input import RouterInputEncoder

Progress = Callable[[str, float], None]
Architecture = Literal["mlp", "albert"]

PROMPT_TOKENS = 96
GENERATED_TOKENS = 48
WORD_MEMORY = 5_000_000  # characters
SPLITTER_FROM = 0.35  # of the progress
LEAST_STEPS = 600  # small task sets are drawn from more often
LOOSE_SHARE = 0.02  # of the training windows, as many more are random ids
# What the last layer keeps of a skill's features where there are many skills: 3 KB each.
LEAST_KEPT_FEATURES, ALL_KEPT_FEATURES = 8, 8_000
HELD_OUT_OTHERS = 600


RECIPES: dict[str, Recipe] = {
    "mlp": Recipe(batch=128, rounds=2, learning_rate=2e-3, weight_decay=0.05),
    "albert": Recipe(batch=16, rounds=1, learning_rate=1e-4, weight_decay=0.01),
}


def train_router(
    tasks: Path,
    out: Path,
    tokenizer: str | Path = "train",
    seed: int = 0,
    on_progress: Progress | None = None,
    arch: Architecture = "mlp",
    pretrained: str | None = None,
    max_examples: int | None = None,
    backbone: Path | None = None,
    out_of_scope: Path | None = None,
) -> RouterReport:
    """Trains a router and writes its folder.

    Args:
        tasks: TASKS/NAME/train.jsonl and dev.jsonl, NAME being the adapter's name.
        out: the folder to write; an existing router is replaced when the new one is whole.
        tokenizer: "train" makes one from the tasks' texts; or what `open_tokenizer` reads.
        seed: the same seed gives the same router on the same machine.
        on_progress: called with (step, fraction).
        arch: "mlp" (5 million parameters at most) or "albert" (11 million).
        pretrained: an ALBERT's folder or hub id to begin from.
        max_examples: trains on so many examples at most, drawn at random.
        backbone: a folder in Hugging Face's layout whose input embeddings the mini-MLP's begin as.
        out_of_scope: a .jsonl file of prompts that no skill is for.

    Raises:
        RouterError: the tasks, the tokenizer or the pretrained weights cannot be used.
        UsageError: `out` exists and is no router.
    """
    begun = time.perf_counter()
    tell = on_progress or (lambda step, fraction: None)
    check_target(out, is_router_folder)
    tell("reading the tasks", 0.0)
    found = read_tasks(tasks)
    taught, measured = read_out_of_scope(out_of_scope, found) if out_of_scope else ((), ())
    tell("preparing the tokenizer", 0.02)
    known = BackboneEmbeddings(backbone) if backbone is not None else None
    if str(tokenizer) == "train":
        pieces = train_tokenizer(found, known.words() if known else ())
    else:
        pieces = open_tokenizer(tokenizer)
    labels = tuple(task.name for task in found)
    settings = RouterSettings(labels, PROMPT_TOKENS, GENERATED_TOKENS, temperature=1.0, spread=True)
    reader = RouterInputEncoder(pieces, settings, WORD_MEMORY)
    separator = pieces.get_vocab_size()

    tell("making examples", 0.08)
    rng = random.Random(seed)
    with _without_collector():
        examples = _examples(ExampleMaker(found, "train", rng, taught), RECIPES[arch])
        if max_examples is not None:
            examples = rng.sample(examples, min(len(examples), max_examples))
        loose = [
            reader.encode_prompt_ids(ids)
            for ids in random_pieces(int(LOOSE_SHARE * len(examples)), separator, rng)
        ]
        training = Windows(examples, reader, len(labels) + 1, separator, loose)
        held_out = {
            kind: Windows(kept, reader, len(labels) + 1, separator)
            for kind, kept in _held_out(ExampleMaker(found, "dev", rng), measured).items()
            if kept
        }
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network(arch, separator + 1, len(labels) + 1, pretrained)
        if isinstance(model, RouterMLP):
            model.rarity.data = training.rarity(separator + 1)
            if known is not None:
                model.embedding.weight.data[:separator] = known.pieces(pieces, EMBEDDING, SPREAD)
        fit(
            model,
            training,
            RECIPES[arch],
            seed,
            lambda done: tell("training", 0.1 + (SPLITTER_FROM - 0.13) * done),
        )
        tell("measuring", SPLITTER_FROM - 0.03)
        model.half().float()  # measured as it is stored
        model.eval()
        with ThreadPoolExecutor(WORKERS) as workers:
            found_scores = workers.map(lambda kept: kept.through(model), held_out.values())
            scores = dict(zip(held_out, found_scores, strict=True))
        temperature = best_temperature(scores, held_out)
        bias = doubt_bias(scores, held_out, len(labels), temperature)
        head = _head(model, training, bias)
        tell("training the request splitter", SPLITTER_FROM)
        splitter = train_splitter(
            found,
            pieces,
            seed,
            lambda done: tell(
                "training the request splitter", SPLITTER_FROM + (0.98 - SPLITTER_FROM) * done
            ),
            known.pieces(pieces, SPLITTER_EMBEDDING, SPREAD) if known is not None else None,
            max_examples,
        )
        taken_apart = measure_splitter(splitter, pieces, found, seed)
    kinds = {
        kind: judge(z, held_out[kind], len(labels), temperature)
        for kind, z in shifted(scores, bias).items()
    }
    foreign = {kind: kinds.pop(kind) for kind in FOREIGN if kind in kinds}
    least = least_confidence(kinds["prompts"])
    report = RouterReport(
        architecture=arch,
        settings=replace(settings, temperature=temperature),
        min_confidence=least,
        vocab_size=separator + 1,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        network=model.settings,
        measured={kind: measure(found, least) for kind, found in kinds.items()},
        others_to_base=round(float((foreign["other texts"].confidence < least).mean()), 4),
        thresholds=thresholds(kinds["prompts"], foreign),
        examples=len(training),
        seconds=round(time.perf_counter() - begun, 1),
        seed=seed,
        splitter=taken_apart,
    )
    with staged(out, is_router_folder) as staging:
        write_router(staging, report, model.state_dict(), head, pieces, splitter)
        single = {kind: judged for kind, judged in kinds.items() if kind not in BLEND_KINDS}
        write_report(staging, labels, single, foreign)
    tell("done", 1.0)
    return report


BLEND_KINDS = ("two at once", "three at once")  # they have several right answers


def _examples(maker: ExampleMaker, recipe: Recipe) -> list[Example]:
    """`recipe.rounds` of examples, more of them where they are few."""
    examples = maker.training()
    least = math.ceil(LEAST_STEPS * recipe.batch / len(examples))
    for _ in range(1, max(recipe.rounds, least)):
        examples += maker.training()
    seen = Counter(each.label for each in examples if len(each.weights) == 1 and not each.generated)
    return examples + maker.balanced(seen)


def _held_out(maker: ExampleMaker, out_of_scope: Sequence[str]) -> dict[str, list[Example]]:
    two, after_two = maker.composites(HELD_OUT_COMPOSITES, 2)
    three, after_three = maker.composites(HELD_OUT_COMPOSITES, 3)
    return {
        "prompts": maker.prompts(),
        "bare prompts": maker.bare_prompts(),
        "reworded": maker.reworded(),
        "misspelt": maker.misspelt(),
        "chat turns": maker.chat_turns(),
        "two at once": two,
        "three at once": three,
        "sentences of two": after_two,
        "sentences of three": after_three,
        "other texts": maker.others(HELD_OUT_OTHERS),
        "out-of-scope file": [
            Example(text, "", {maker.out_of_scope: 1.0}) for text in out_of_scope
        ],
    }


def _network(
    arch: Architecture, vocab_size: int, num_rows: int, pretrained: str | None
) -> RouterNetwork:
    if arch == "mlp":
        return RouterMLP(vocab_size, num_rows)
    from dlp_edge.models.networks.router_albert import RouterAlbert

    network = RouterAlbert(vocab_size, num_rows)
    if pretrained is not None:
        network.take_weights(pretrained)
    return network


def _head(model: RouterNetwork, training: Windows, bias: float) -> RouterHead:
    """The last layer, with features of the training windows of every row."""
    owners = training.targets.argmax(1)
    certain = training.targets.max(1).values == 1
    rows: list[int] = []
    count = training.targets.shape[1]
    most = min(KEPT_FEATURES, max(LEAST_KEPT_FEATURES, ALL_KEPT_FEATURES // count))
    for row in range(count):
        own = torch.nonzero((owners == row) & certain).squeeze(1)
        rows += own[torch.randperm(len(own))[:most]].tolist()
    features = training.through(model.features, rows)
    biases = model.head.bias.detach().clone()
    biases[-1] += bias
    weight = model.head.weight.detach()
    return RouterHead(
        functional.pad(weight, (0, model.width - weight.shape[1])).numpy(),
        biases.numpy(),
        features.numpy().astype(np.float16),
        owners[rows].numpy(),
    )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Examples make no cycles; the garbage collector would walk through all of them, often."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
