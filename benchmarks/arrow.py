"""PEFT's Arrow on the evaluation's tasks: routing for every token and layer, without training.

    python benchmarks/arrow.py TASKS --backbone FILE.gguf --adapter NAME=DIR ... [--limit 20]

Arrow (arXiv 2405.11157) takes each adapter's first right singular vector for its prototype and
gives a token to the adapters whose prototypes it lies nearest to. Here in transformers and fp32,
beside each task's own adapter in the same engine, marked as `dlp-edge eval` marks. All adapters
must have one shape.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from dlp_edge.evaluation.metrics import mark
from dlp_edge.export.source import Source, load_source
from dlp_edge.tasks.samples import Sample, read_samples

BATCH = 10
Writer = Any  # a causal model of transformers


def answers(model: Writer, source: Source, samples: Sequence[Sample]) -> list[str]:
    """Greedy answers to ChatML prompts, as long at most as twice the task's longest response."""
    tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    room = 2 * max(len(tokenizer.encode(sample.response).ids) for sample in samples) + 8
    found = []
    for start in range(0, len(samples), BATCH):
        prompts = [
            tokenizer.encode(
                f"<|im_start|>user\n{sample.prompt}<|im_end|>\n<|im_start|>assistant\n",
                add_special_tokens=False,
            ).ids
            for sample in samples[start : start + BATCH]
        ]
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        with torch.no_grad():
            written = model.generate(
                input_ids=torch.tensor(
                    [[0] * left + ids for left, ids in zip(padding, prompts, strict=True)]
                ),
                attention_mask=torch.tensor(
                    [[0] * left + [1] * (width - left) for left in padding]
                ),
                max_new_tokens=room,
                do_sample=False,
                eos_token_id=list(source.eos_token_ids),
                pad_token_id=source.eos_token_ids[0],
            )
        found += tokenizer.decode_batch(written[:, width:].tolist())
    return found


def scores(model: Writer, source: Source, samples: Sequence[Sample]) -> float:
    """Mean of the headline mark, 0 to 1."""
    texts = answers(model, source, samples)
    marks = [mark(text, sample).score for text, sample in zip(texts, samples, strict=True)]
    return sum(marks) / len(marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--backbone", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--adapter", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--limit", type=int, default=20, help="samples of a task")
    parser.add_argument("--top", type=int, default=3, help="adapters a token (PEFT's default: 3)")
    arguments = parser.parse_args()
    adapters = dict(text.split("=", 1) for text in arguments.adapter)
    samples = {
        name: read_samples(arguments.tasks / name / "dev.jsonl")[: arguments.limit]
        for name in adapters
    }
    with load_source(arguments.backbone) as source:
        found = {
            "arrow": _arrow(source, adapters, samples, arguments.top),
            "single": _single(source, adapters, samples),
        }
    print("| task | own adapter | Arrow |\n|---|---|---|")
    for name in adapters:
        print(f"| {name} | {found['single'][name]:.1%} | {found['arrow'][name]:.1%} |")
    means = {system: sum(marks.values()) / len(marks) for system, marks in found.items()}
    print(f"| mean | {means['single']:.1%} | {means['arrow']:.1%} |")


def _arrow(
    source: Source, adapters: dict[str, str], samples: dict[str, tuple[Sample, ...]], top: int
) -> dict[str, float]:
    model = create_arrow_model(_base(source), list(adapters.values()), ArrowConfig(top_k=top))
    model.eval()
    bar = tqdm(samples.items(), desc="Arrow", file=sys.stderr, disable=None)
    return {name: scores(model, source, own) for name, own in bar}


def _single(
    source: Source, adapters: dict[str, str], samples: dict[str, tuple[Sample, ...]]
) -> dict[str, float]:
    (first, folder), *others = adapters.items()
    model = PeftModel.from_pretrained(_base(source), folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    model.eval()
    found = {}
    for name, own in tqdm(samples.items(), desc="own adapters", file=sys.stderr, disable=None):
        model.set_adapter(name)
        found[name] = scores(model, source, own)
    return found


def _base(source: Source) -> Writer:
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)


if __name__ == "__main__":
    main()
