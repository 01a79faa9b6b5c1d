"""Train the demo's LoRA adapters with PEFT, one a skill, on two CPU cores in about an hour.

    python recipes/demo_tasks.py tasks/
    python recipes/demo_adapters.py tasks/ adapters/ --backbone SmolLM2.gguf

Each adapter learns its own task and, beside it, its part in an answer to two questions: where a
prompt asks for two skills, the loss covers the sentences that the skill has to write, the first
token of the sentence after them (the runtime changes the fusion only when it has seen that
token), and the opening tokens of the whole answer (which are written under a blend of both).
Resumable: a finished adapter is left alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from dlp_edge.export.source import load_source

OPENING_TOKENS = 3
JOINS = (" ", "\n", "\nThen: ", " And then: ", " Also, ", "\n\n")


@dataclass(frozen=True)
class Example:
    ids: list[int]
    learn: list[bool]  # learn[i]: does the loss cover predicting ids[i]?


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return encode(tokenizer, f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")


def single(tokenizer: Tokenizer, sample: dict[str, str]) -> Example:
    start = prompt_ids(tokenizer, sample["prompt"])
    answer = encode(tokenizer, sample["response"] + "<|im_end|>")
    return Example(start + answer, [False] * len(start) + [True] * len(answer))


def pair(
    tokenizer: Tokenizer, first: dict[str, str], second: dict[str, str], own: int, join: str
) -> Example:
    """Two questions, two answers; the loss covers what skill `own` (0 or 1) has to write."""
    start = prompt_ids(tokenizer, first["prompt"] + join + second["prompt"])
    answers = (
        encode(tokenizer, first["response"] + "\n"),
        encode(tokenizer, second["response"] + "<|im_end|>"),
    )
    if own == 0:
        learn = [True] * len(answers[0]) + [True] + [False] * (len(answers[1]) - 1)
    else:
        opening = min(OPENING_TOKENS, len(answers[0]))
        learn = [True] * opening + [False] * (len(answers[0]) - opening)
        learn += [False] + [True] * (len(answers[1]) - 1)
    return Example(start + answers[0] + answers[1], [False] * len(start) + learn)


def examples_for(
    name: str, tasks: dict[str, list[dict[str, str]]], tokenizer: Tokenizer, rng: random.Random
) -> list[Example]:
    """Every sample of the task alone, and a third of them as the first or second of two."""
    others = [task for task in tasks if task != name]
    examples = [single(tokenizer, sample) for sample in tasks[name]]
    for index, sample in enumerate(tasks[name][::3]):
        other = rng.choice(tasks[rng.choice(others)])
        own = index % 2
        first, second = (sample, other) if own == 0 else (other, sample)
        examples.append(pair(tokenizer, first, second, own, rng.choice(JOINS)))
    return examples


def batches(examples: list[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """Batches of about equal lengths (less padding), in random order."""
    ordered = sorted(examples, key=lambda example: (len(example.ids), rng.random()))
    grouped = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    rng.shuffle(grouped)
    return grouped


def batch_loss(model: torch.nn.Module, batch: list[Example], pad: int) -> torch.Tensor:
    """Mean cross entropy; the head runs on the learnt positions only."""
    width = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [pad] * (width - len(example.ids)) for example in batch])
    mask = torch.tensor(
        [[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in batch], dtype=torch.long
    )
    learn = torch.tensor([e.learn + [False] * (width - len(e.learn)) for e in batch])
    causal = model.get_base_model()  # type: ignore[operator]
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = causal.lm_head(hidden[:, :-1][learn[:, 1:]])
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, ids[:, 1:][learn[:, 1:]])
    return loss


def train(
    backbone: Path,
    tokenizer: Tokenizer,
    name: str,
    tasks: dict[str, list[dict[str, str]]],
    out: Path,
    epochs: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rng = random.Random(f"{seed}:{name}")
    base = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    examples = examples_for(name, tasks, tokenizer, rng)
    plan = [batch for _ in range(epochs) for batch in batches(examples, 4, rng)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=len(plan), pct_start=0.1
    )
    begun, recent = time.perf_counter(), []
    for step, batch in enumerate(plan, 1):
        loss = batch_loss(model, batch, pad=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = [*recent[-24:], loss.item()]
        if step % 25 == 0 or step == len(plan):
            print(
                f"{name}: step {step}/{len(plan)} loss {sum(recent) / len(recent):.4f} "
                f"{time.perf_counter() - begun:.0f} s",
                flush=True,
            )
    staging = out / f".{name}.partial"
    model.save_pretrained(staging)
    shrink(staging)
    staging.replace(out / name)


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


def read_tasks(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {
        path.parent.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted(folder.glob("*/train.jsonl"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--only", nargs="*", help="names of the tasks to train (default: all)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tasks = read_tasks(arguments.tasks)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with load_source(arguments.backbone) as source:
        tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
        for name in arguments.only or tasks:
            if not (arguments.out / name / "adapter_model.safetensors").exists():
                train(
                    source.folder,
                    tokenizer,
                    name,
                    tasks,
                    arguments.out,
                    arguments.epochs,
                    arguments.seed,
                )


if __name__ == "__main__":
    main()
