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
checkpoint. `dlp-edge train-skill` trains a single adapter, from any examples.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from dlp_edge.export.source import load_source
from dlp_edge.models.skill_examples import (
    Example,
    PromptFormat,
    examples_for_all,
    skill_examples,
)
from dlp_edge.models.skill_training import SkillRecipe, is_adapter_folder, train_skill
from dlp_edge.progress import to_tqdm
from dlp_edge.tasks.samples import Sample, read_samples
from dlp_edge.untrusted.chat_template import ChatTemplate

# ChatML, as SmolLM2 and Qwen read it.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def read_tasks(folder: Path, samples: int) -> dict[str, Sequence[Sample]]:
    """Task -> at most so many of its samples."""
    files = sorted(folder.glob("*/train.jsonl"))
    return {path.parent.name: read_samples(path)[:samples] for path in files}


def main() -> None:
    arguments = parse_arguments()
    tasks = read_tasks(arguments.tasks, arguments.samples)
    names = [arguments.multi] if arguments.multi else arguments.only or list(tasks)
    unknown = sorted(set(names) - set(tasks)) if not arguments.multi else []
    if not tasks or unknown:
        missing = ", ".join(unknown) or "any task"
        sys.exit(f"{arguments.tasks} has no NAME/train.jsonl for {missing}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with load_source(arguments.backbone) as source:
        tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
        form = PromptFormat(tokenizer, ChatTemplate(TEMPLATE), "", "<|im_end|>")
        for name in names:
            if not is_adapter_folder(arguments.out / name):
                examples = make_examples(name, tasks, form, arguments)
                train(source.folder, name, examples, arguments)


def make_examples(
    name: str,
    tasks: dict[str, Sequence[Sample]],
    form: PromptFormat,
    arguments: argparse.Namespace,
) -> list[Example]:
    rng = random.Random(f"{arguments.seed}:{name}:examples")
    if arguments.multi:
        return examples_for_all(form, tasks, arguments.pairs, rng)
    others = {task: samples for task, samples in tasks.items() if task != name}
    return skill_examples(form, tasks[name], others, arguments.pairs, rng)


def train(
    backbone: Path, name: str, examples: list[Example], arguments: argparse.Namespace
) -> None:
    recipe = SkillRecipe(
        rank=arguments.rank or (64 if arguments.multi else 8),
        epochs=arguments.epochs,
        tokens=arguments.tokens,
        longest=arguments.longest,
        seed=arguments.seed,
    )
    with tqdm(total=100, desc=name, disable=None, leave=False) as bar:
        report = train_skill(
            backbone, examples, [], arguments.out / name, recipe, BASE_MODEL, to_tqdm(bar)
        )
    print(
        f"{name}: {report.examples} examples ({report.left_out} too long), {report.steps} steps, "
        f"loss {report.loss:.3f}, {report.seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
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
    return parser.parse_args()


if __name__ == "__main__":
    main()
