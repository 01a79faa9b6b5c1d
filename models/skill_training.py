"""Trains a LoRA adapter on a skill's examples, with PEFT."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlp_edge.atomic.sharing import move
from dlp_edge.atomic.staging import check_target
from dlp_edge.bundle.peft_reader import CONFIG, WEIGHTS
from dlp_edge.errors import RouterError, UsageError
from dlp_edge.models.skill_examples import Example, in_batches

CHECKPOINT_EVERY = 100  # steps
LEAST_STEPS = 150  # of a skill with few examples, which is read several times
MOST_EPOCHS = 20
_CHECKPOINT = "checkpoint.pt"

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class SkillRecipe:
    """How an adapter is trained: AdamW under a one-cycle rate; alpha is twice the rank.

    Attributes:
        epochs: how often each example is read; None takes two, or as many as make LEAST_STEPS.
        tokens: of a batch, with its padding.
        longest: tokens of an example; longer ones are left out.
    """

    rank: int = 8
    epochs: int | None = None
    tokens: int = 512
    longest: int = 700
    seed: int = 0
    learning_rate: float = 2e-3
    targets: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Fit:
    """How well a model predicts answers that it was not trained on, given their beginning.

    Attributes:
        loss: mean cross entropy of a token, in nats.
        tokens: the share of tokens that are the most probable one.
        answers: the share of answers of which that holds for every token: greedy decoding writes
            exactly these.
    """

    loss: float
    tokens: float
    answers: float


@dataclass(frozen=True)
class SkillReport:
    """What training did.

    Attributes:
        examples, left_out: trained on, and too long for it.
        held_out: examples that were measured on instead; without any there is no `before`, `after`.
        loss: of the last fifty steps.
    """

    examples: int
    left_out: int
    held_out: int
    epochs: int
    steps: int
    loss: float
    before: Fit | None
    after: Fit | None
    seconds: float


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, so that a new one may replace it."""
    return (folder / CONFIG).is_file()


def train_skill(
    backbone: Path,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    out: Path,
    recipe: SkillRecipe,
    base_model: str,
    on_progress: Progress = lambda step, fraction: None,
) -> SkillReport:
    """Trains an adapter and writes its folder. An interrupted training resumes when it is
    started again with the same arguments.

    Args:
        backbone: a folder in Hugging Face's layout.
        held_out: examples to measure on.
        base_model: the name of the backbone that the adapter's configuration keeps.
        on_progress: called with (step, fraction).

    Raises:
        RouterError: no example is short enough.
        UsageError: `out` exists and is no adapter.
    """
    started = time.perf_counter()
    check_target(out, is_adapter_folder)
    kept = [example for example in examples if len(example.ids) <= recipe.longest]
    measured = [example for example in held_out if len(example.ids) <= recipe.longest]
    if not kept:
        raise RouterError(
            f"no example has {recipe.longest} tokens or fewer", "Shorten them, or allow longer ones"
        )
    torch.manual_seed(recipe.seed)
    on_progress("loading the backbone", 0.0)
    model, weights = _load(backbone, recipe)
    epochs, plan = _plan(kept, recipe, random.Random(f"{recipe.seed}:{out.name}"))
    before = _measure(model, measured)
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate / 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=len(plan), pct_start=0.1
    )
    staging = out.with_name(f".{out.name}.partial")
    begun = _resume(staging, weights, optimizer, schedule)
    recent: list[float] = []
    for step, batch in enumerate(plan[begun:], begun + 1):
        on_progress("training", 0.05 + 0.9 * (step - 1) / len(plan))
        loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], loss.item()]
        if step % CHECKPOINT_EVERY == 0:
            _keep(staging, step, weights, optimizer, schedule)
    on_progress("measuring", 0.95)
    after = _measure(model, measured)
    model.save_pretrained(staging)
    _shrink(staging, base_model)
    shutil.rmtree(out, ignore_errors=True)
    move(staging, out)
    on_progress("done", 1.0)
    mean = sum(recent) / max(1, len(recent))
    left_out, seconds = len(examples) - len(kept), time.perf_counter() - started
    return SkillReport(
        len(kept), left_out, len(measured), epochs, len(plan), mean, before, after, seconds
    )


def _load(backbone: Path, recipe: SkillRecipe) -> tuple[Any, list[torch.nn.Parameter]]:
    """The backbone under PEFT, and the weights of its new adapter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():  # a bar of its own
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).to(device)
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            raise UsageError(
                f"the backbone has no layers {', '.join(recipe.targets)}", "Choose other targets"
            ) from error
    return model, [p for p in model.parameters() if p.requires_grad]


def _plan(
    examples: Sequence[Example], recipe: SkillRecipe, rng: random.Random
) -> tuple[int, list[list[Example]]]:
    """How many epochs there are, and the batches of all of them."""
    epochs = 0
    plan: list[list[Example]] = []
    while epochs < (recipe.epochs or MOST_EPOCHS):
        if recipe.epochs is None and epochs >= 2 and len(plan) >= LEAST_STEPS:
            break
        plan += in_batches(examples, recipe.tokens, rng)
        epochs += 1
    return epochs, plan


def batch_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Mean cross entropy over the learnt tokens."""
    logits, wanted = _predict(model, batch)
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, wanted)
    return loss


def _predict(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the learnt tokens, and their ids; the head runs on these positions only."""
    device = next(model.parameters()).device
    width = max(len(example.ids) for example in batch)
    ids, mask, learn = (
        torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        for rows in (
            [example.ids for example in batch],
            [[1] * len(example.ids) for example in batch],
            [[int(learn) for learn in example.learn] for example in batch],
        )
    )
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    chosen = learn[:, 1:].bool()
    return causal.lm_head(hidden[:, :-1][chosen]), ids[:, 1:][chosen]


@torch.no_grad()
def _measure(model: Any, examples: Sequence[Example]) -> Fit | None:
    """How well the answers of examples are predicted; None without any."""
    if not examples:
        return None
    model.eval()
    losses, hits, answers = [], [], []
    for example in examples:
        logits, wanted = _predict(model, [example])
        right = logits.argmax(-1) == wanted
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        hits.append(right)
        answers.append(bool(right.all()))
    model.train()
    loss, hit = torch.cat(losses).mean().item(), torch.cat(hits).float().mean().item()
    return Fit(loss, hit, sum(answers) / len(answers))


def _keep(
    staging: Path,
    step: int,
    weights: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Writes a checkpoint, in one step."""
    staging.mkdir(exist_ok=True)
    state = {
        "step": step,
        "weights": weights,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    part = staging / f"{_CHECKPOINT}.part"
    torch.save(state, part)
    move(part, staging / _CHECKPOINT)


def _resume(
    staging: Path,
    weights: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Takes up the checkpoint where there is one; returns the steps that are done."""
    if not (staging / _CHECKPOINT).is_file():
        shutil.rmtree(staging, ignore_errors=True)
        return 0
    # Our own file of a moment ago; its optimizer state is more than bare tensors.
    state = torch.load(staging / _CHECKPOINT, weights_only=False)
    with torch.no_grad():
        for weight, kept in zip(weights, state["weights"], strict=True):
            weight.copy_(kept)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])


def _shrink(folder: Path, base_model: str) -> None:
    """Keeps what a user of the adapter needs: fp16 weights and the configuration."""
    weights = load_file(folder / WEIGHTS)
    halves = {key: value.to(torch.float16) for key, value in weights.items()}
    save_file(halves, folder / WEIGHTS, metadata={"format": "pt"})
    config = folder / CONFIG
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base_model
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in ("README.md", _CHECKPOINT):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
