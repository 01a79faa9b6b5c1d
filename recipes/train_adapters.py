"""Train LoRA adapters with PEFT: one a task, and one on all tasks together.

    python recipes/train_adapters.py tasks/ adapters/ --backbone SmolLM2.gguf
    python recipes/train_adapters.py tasks/ adapters/ --backbone SmolLM2.gguf --multi all

Each adapter learns its own task and, beside it, its part in an answer to two questions: where a
prompt asks for two skills, the loss covers the sentences that the skill has to write, the first
token of the sentence after them (the runtime changes the fusion only when it has seen that
token), and the opening tokens of the whole answer (which are written under a blend of both).
`--multi NAME` trains the paper's other baseline instead, a single adapter of a higher rank on all
tasks and the whole of both answers.

Seeded. Resumable: a finished adapter is left alone, and one in the making goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from dlp_edge.export.source import load_source
from dlp_edge.tasks.samples import Sample, read_samples

OPENING_TOKENS = 3
JOINS = (" ", "\n", "\nThen: ", " And then: ", " Also, ", "\n\n")


CHECKPOINT_EVERY = 100  # steps


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained; `pairs` is one in how many samples that are also asked in pairs
    (0: none), `tokens` how many a batch holds."""

    rank: int
    samples: int
    epochs: int
    pairs: int
    tokens: int
    longest: int
    seed: int


@dataclass(frozen=True)
class Example:
    ids: list[int]
    learn: list[bool]  # learn[i]: does the loss cover predicting ids[i]?


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return encode(tokenizer, f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")


def single(tokenizer: Tokenizer, sample: Sample) -> Example:
    start = prompt_ids(tokenizer, sample.prompt)
    answer = encode(tokenizer, sample.response + "<|im_end|>")
    return Example(start + answer, [False] * len(start) + [True] * len(answer))


def pair(
    tokenizer: Tokenizer, first: Sample, second: Sample, own: int | None, join: str
) -> Example:
    """Two questions, two answers; the loss covers what skill `own` (0 or 1) has to write, or all
    where there is one adapter for everything (None)."""
    start = prompt_ids(tokenizer, first.prompt + join + second.prompt)
    answers = (
        encode(tokenizer, first.response + "\n"),
        encode(tokenizer, second.response + "<|im_end|>"),
    )
    if own is None:
        learn = [True] * (len(answers[0]) + len(answers[1]))
    elif own == 0:
        learn = [True] * len(answers[0]) + [True] + [False] * (len(answers[1]) - 1)
    else:
        opening = min(OPENING_TOKENS, len(answers[0]))
        learn = [True] * opening + [False] * (len(answers[0]) - opening)
        learn += [False] + [True] * (len(answers[1]) - 1)
    return Example(start + answers[0] + answers[1], [False] * len(start) + learn)


def examples_for(
    name: str,
    tasks: dict[str, Sequence[Sample]],
    recipe: Recipe,
    tokenizer: Tokenizer,
    rng: random.Random,
) -> list[Example]:
    """Every sample of the task alone, and some of them as the first or second of two."""
    others = [task for task in tasks if task != name]
    samples = tasks[name][: recipe.samples]
    examples = [single(tokenizer, sample) for sample in samples]
    for index, sample in enumerate(samples[:: recipe.pairs] if recipe.pairs else []):
        other = rng.choice(tasks[rng.choice(others)])
        own = index % 2
        first, second = (sample, other) if own == 0 else (other, sample)
        examples.append(pair(tokenizer, first, second, own, rng.choice(JOINS)))
    return examples


def examples_for_all(
    tasks: dict[str, Sequence[Sample]], recipe: Recipe, tokenizer: Tokenizer, rng: random.Random
) -> list[Example]:
    """What the tasks' own adapters learn, in one: every sample alone, some of them in pairs."""
    samples = [sample for task in tasks.values() for sample in task[: recipe.samples]]
    examples = [single(tokenizer, sample) for sample in samples]
    for sample in samples[:: recipe.pairs] if recipe.pairs else []:
        other = rng.choice(tasks[rng.choice(list(tasks))])
        first, second = rng.sample((sample, other), 2)
        examples.append(pair(tokenizer, first, second, None, rng.choice(JOINS)))
    return examples


def batches(examples: list[Example], tokens: int, rng: random.Random) -> list[list[Example]]:
    """Batches of at most `tokens` with their padding, of about equal lengths, in random order."""
    grouped: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda example: (len(example.ids), rng.random())):
        if grouped[-1] and (len(grouped[-1]) + 1) * len(example.ids) > tokens:
            grouped.append([])
        grouped[-1].append(example)
    rng.shuffle(grouped)
    return grouped


def batch_loss(model: torch.nn.Module, batch: list[Example]) -> torch.Tensor:
    """Mean cross entropy; the head runs on the learnt positions only."""
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
    causal = model.get_base_model()  # type: ignore[operator]
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    chosen = learn[:, 1:].bool()
    logits = causal.lm_head(hidden[:, :-1][chosen])
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, ids[:, 1:][chosen])
    return loss


def train(backbone: Path, name: str, examples: list[Example], out: Path, recipe: Recipe) -> None:
    """Trains one adapter into out/name; out/.name.partial keeps what an interrupted run did."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(f"{recipe.seed}:{name}")
    kept = [example for example in examples if len(example.ids) <= recipe.longest]
    plan = [batch for _ in range(recipe.epochs) for batch in batches(kept, recipe.tokens, rng)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).to(device)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=len(plan), pct_start=0.1
    )
    staging = out / f".{name}.partial"
    begun = _resume(staging, weights, optimizer, schedule)
    started, recent = time.perf_counter(), []
    for step, batch in _steps(plan, begun, name):
        loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], loss.item()]
        if step % CHECKPOINT_EVERY == 0:
            _keep(staging, step, weights, optimizer, schedule)
    model.save_pretrained(staging)
    shrink(staging)
    (staging / "checkpoint.pt").unlink(missing_ok=True)
    staging.replace(out / name)
    print(
        f"{name}: {len(kept)} examples ({len(examples) - len(kept)} too long), {len(plan)} steps, "
        f"loss {sum(recent) / max(1, len(recent)):.3f}, {time.perf_counter() - started:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def _steps(plan: list[list[Example]], begun: int, name: str) -> Iterator[tuple[int, list[Example]]]:
    bar = tqdm(plan[begun:], desc=name, initial=begun, total=len(plan), disable=None, leave=False)
    return enumerate(bar, begun + 1)


def _keep(
    staging: Path,
    step: int,
    weights: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    staging.mkdir(exist_ok=True)
    state = {
        "step": step,
        "weights": weights,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    torch.save(state, staging / "checkpoint.part")
    (staging / "checkpoint.part").replace(staging / "checkpoint.pt")


def _resume(
    staging: Path,
    weights: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Takes up the checkpoint where there is one; returns the steps that are done."""
    if not (staging / "checkpoint.pt").is_file():
        shutil.rmtree(staging, ignore_errors=True)
        return 0
    # Our own file of a moment ago; its optimizer state is more than bare tensors.
    state = torch.load(staging / "checkpoint.pt", weights_only=False)
    with torch.no_grad():
        for weight, kept in zip(weights, state["weights"], strict=True):
            weight.copy_(kept)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])


def shrink(folder: Path) -> None:
    """Keep what a user of the adapter needs: fp16 weights and the configuration."""
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: value.to(torch.float16) for key, value in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def read_tasks(folder: Path) -> dict[str, Sequence[Sample]]:
    return {path.parent.name: read_samples(path) for path in sorted(folder.glob("*/train.jsonl"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--only", nargs="*", help="names of the tasks to train (default: all)")
    parser.add_argument("--multi", metavar="NAME", help="train one adapter on all the tasks")
    parser.add_argument("--rank", type=int, help="default: 8, and 64 with --multi")
    parser.add_argument("--samples", type=int, default=900, help="of a task, at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3, help="one in how many also in pairs; 0: no")
    parser.add_argument("--tokens", type=int, default=512, help="of a batch")
    parser.add_argument("--longest", type=int, default=700, help="tokens of an example")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    recipe = Recipe(
        arguments.rank or (64 if arguments.multi else 8),
        arguments.samples,
        arguments.epochs,
        arguments.pairs,
        arguments.tokens,
        arguments.longest,
        arguments.seed,
    )
    tasks = read_tasks(arguments.tasks)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with load_source(arguments.backbone) as source:
        tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
        for name in [arguments.multi] if arguments.multi else arguments.only or tasks:
            if (arguments.out / name / "adapter_model.safetensors").exists():
                continue
            rng = random.Random(f"{recipe.seed}:{name}:examples")
            examples = (
                examples_for_all(tasks, recipe, tokenizer, rng)
                if arguments.multi
                else examples_for(name, tasks, recipe, tokenizer, rng)
            )
            train(source.folder, name, examples, arguments.out, recipe)


if __name__ == "__main__":
    main()
