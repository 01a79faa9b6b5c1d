"""Accuracy and speed of a router, measured through the runtime.

    python benchmarks/router.py accuracy TASKS ROUTER
    python benchmarks/router.py time TASKS ROUTER [ROUTER ...]
    python benchmarks/router.py add TASKS --left-out NAME [NAME ...]

`accuracy` reads the tasks' dev files. Its disturbances and out-of-task texts are written for it;
none is taught. Kinds of text are: training has letters, recipes, code, chat, news and reviews of
its own, and two of the chat openers ("thanks! and now: ", "One more") begin like the ones that
training measures its report on. Joins of composite prompts are mostly those of training. `add`
trains a router without some tasks, all of them at once, then teaches it each alone from examples
of its training file.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dlp_edge.bundle.router_head import RouterHead, head_from_bytes
from dlp_edge.export.router import export_router, trace_graph
from dlp_edge.models.networks.router_albert import RouterAlbert
from dlp_edge.models.router_folder import read_card, read_router
from dlp_edge.models.tasks import Task, read_tasks
from dlp_edge.models.training import train_router
from dlp_edge.runtime.adapters.fit_router_row import fit_router_row
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.text.sentences import SentenceSplitter
from dlp_edge.tasks.boilerplate import CommonText
from dlp_edge.tasks.samples import Sample

OTHERS = Path(__file__).parent / "data" / "out_of_task.txt"
REWORDED = {
    "absnarr": "Here is a little story. Which saying does it illustrate?",
    "conparakc": "Read the passage and answer what is asked, taking everything in it as a fact.",
    "csalg": "Solve this small computer science exercise.",
    "epireason": "Does the second statement follow from the first one?",
    "formfall": "Check whether the reasoning below holds water.",
    "langid": "Which tongue is this written in?",
    "logdeduc": "Several things are lined up in some order; which statement must be true?",
    "playdiag": "These lines come from old plays. Tell me if one character says both or not.",
    "quessel": "I give you an answer and a text. Pick the question that belongs to it.",
    "vitafact": "Judge the assertion using nothing but the encyclopedia extract.",
    "winowhy": "Is this explanation of what the pronoun stands for right?",
}
ANY_TASK = "Have a go at this, would you?"
TURNS = (
    *("thanks! and now: ", "perfect. can you do this as well? ", "hmm I see. here's another: "),
    *("One more please:\n", "hi there :) quick question, ", "sorry to bother you again but "),
)
NEIGHBOURS = dict(
    zip("asdfghjklqwertyuiopzxcvbnm", "sdfghjklkwertyuiopoxcvbnmn", strict=True)
)  # the key to the right
PROMPT_JOINS = (" ", "\n", "\n\n", " And then: ", "\nAfter that, ")
ANSWER_JOINS = ("\n", "\n\n", " ")
SENTENCE_TASKS = ("gsm8k", "stratqa", "topchat")
PHRASE_TASKS = (*SENTENCE_TASKS, "logdeduc", "absnarr", "quessel", "lingpuzz")
COMPOSITES = 400
TIMED, TIMED_SLOW = 600, 60  # prompts at most; for the ALBERT
TOKENS = 256


def load(folder: Path) -> tuple[Router, float]:
    """A trained router as a bundle holds it, and its `min_confidence`."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        entry = export_router(folder, out)
        router = Router(
            (out / "router.onnx").read_bytes(),
            head_from_bytes((out / "router_head.safetensors").read_bytes()),
            Tokenizer.from_file(str(out / "router_tokenizer.json")),
            entry.settings,
        )
        return router, entry.selection.min_confidence


def disturbances(task: Task, rng: random.Random) -> dict[str, Callable[[Sample], str]]:
    """Perturbations of a task's prompts, by name."""
    common = CommonText([sample.prompt for sample in task.train])
    first = [sample.prompt.split("\n")[0] for sample in task.train]
    fixed = {line for line in set(first) if first.count(line) >= 0.05 * len(first)}

    def no_choices(sample: Sample) -> str:
        lines = sample.prompt.split("\n")
        return "\n".join(line for line in lines if not line.startswith("choice:"))

    def no_instruction(sample: Sample) -> str:
        line, _, rest = no_choices(sample).partition("\n")
        return rest if rest.strip() and line in fixed else no_choices(sample)

    def bare(sample: Sample) -> str:
        return common.strip(sample) or sample.prompt

    def reworded(sample: Sample) -> str:
        return f"{REWORDED.get(task.name, ANY_TASK)}\n{no_instruction(sample)}"

    return {
        "as it is": lambda sample: sample.prompt,
        "no choices": no_choices,
        "no instruction, no choices": no_instruction,
        "nothing in common": bare,
        "instruction reworded": reworded,
        "typing errors": lambda sample: mistyped(sample.prompt, rng),
        "typing errors, no instruction": lambda sample: mistyped(no_instruction(sample), rng),
        "in a chat turn": lambda sample: rng.choice(TURNS) + sample.prompt,
        "in a chat turn, no instruction": lambda s: rng.choice(TURNS) + no_instruction(s),
        "lower case, no instruction": lambda s: no_instruction(s).lower().rstrip(".?! "),
    }


def mistyped(text: str, rng: random.Random, rate: float = 0.02) -> str:
    """Add typos: adjacent keys, missing or doubled letters, missing spaces."""
    typed = []
    for sign in text:
        draw = rng.random()
        if sign.isalpha() and draw < rate:
            typed.append(rng.choice((NEIGHBOURS.get(sign.lower(), sign), "", sign * 2)))
        elif sign != " " or draw > rate / 3:
            typed.append(sign)
    return "".join(typed)


def composites(
    tasks: Sequence[Task], count: int, each: int, rng: random.Random
) -> list[tuple[str, str, str, bool]]:
    """(prompt, answer so far, right task, whether it is the first sentence) at every sentence
    start of right answers to prompts of `each` tasks."""
    found = []
    for _ in range(count):
        chosen = rng.sample(list(tasks), each)
        samples = [rng.choice(task.dev) for task in chosen]
        prompt, answer, ends = samples[0].prompt, "", []
        for sample in samples[1:]:
            prompt += rng.choice(PROMPT_JOINS) + sample.prompt
        for sample in samples:
            answer += (rng.choice(ANSWER_JOINS) if answer else "") + sample.response
            ends.append(len(answer))
        found.append((prompt, "", chosen[0].name, True))
        for start in SentenceSplitter().feed(answer):
            word = re.match(r"\w+|[^\w\s]+|\s", answer[start:])
            end = start + (word.end() if word else 1)
            found.append((prompt, answer[:end], chosen[bisect_right(ends, start)].name, False))
    return found


def calibration_error(pairs: Iterable[tuple[float, bool]], bins: int = 15) -> float:
    """Expected calibration error of (probability, right) pairs."""
    buckets: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for confidence, right in pairs:
        buckets[min(bins - 1, int(confidence * bins))].append((confidence, right))
    total = sum(map(len, buckets))
    return (
        sum(abs(sum(c for c, _ in bucket) - sum(r for _, r in bucket)) for bucket in buckets)
        / total
    )


def top(router: Router, prompt: str, generated: str = "") -> tuple[str, float, float]:
    """The most probable adapter, its probability, and the confidence in it."""
    found = router.classify(prompt, generated)
    name = max(found.probabilities, key=lambda label: found.probabilities[label])
    y = found.probabilities[name]
    return name, y, y * (1 - found.doubt)


def measure_accuracy(tasks: Sequence[Task], folder: Path) -> None:
    router, least = load(folder)
    rng = random.Random(7)
    print(f"{'prompts':<34}{'accuracy':>9}{'error':>8}{'kept':>8}   worst")
    ways = [disturbances(task, rng) for task in tasks]
    for name in ways[0]:
        pairs, kept, worst = [], [], []
        for task, way in zip(tasks, ways, strict=True):
            found = [top(router, way[name](sample)) for sample in task.dev]
            pairs += [(y, label == task.name) for label, y, _ in found]
            kept += [confidence >= least for _, _, confidence in found]
            worst.append((statistics.mean(right for _, right in pairs[-len(found) :]), task.name))
        print(
            f"{name:<34}{sum(right for _, right in pairs) / len(pairs):>9.2%}"
            f"{calibration_error(pairs):>8.3f}"
            f"{statistics.mean(kept):>8.2%}   "
            + ", ".join(f"{task} {share:.0%}" for share, task in sorted(worst)[:2])
        )
    print(f"\n{'sentences':<34}{'first':>9}{'later':>9}{'all':>9}{'count':>8}")
    for kind, names in (
        ("tasks whose answers are sentences", SENTENCE_TASKS),
        ("and phrases", PHRASE_TASKS),
        ("all tasks", tuple(task.name for task in tasks)),
    ):
        chosen = [task for task in tasks if task.name in names]
        for each in (2, 3):
            if len(chosen) < each:
                continue
            asked = composites(chosen, COMPOSITES, each, rng)
            hits = [
                (top(router, prompt, answer)[0] == right, first)
                for prompt, answer, right, first in asked
            ]
            first = [hit for hit, is_first in hits if is_first]
            later = [hit for hit, is_first in hits if not is_first]
            row = f"{statistics.mean(first):>9.1%}{statistics.mean(later):>9.1%}"
            both = statistics.mean(hit for hit, _ in hits)
            print(f"{f'{each}: {kind}':<34}{row}{both:>9.1%}{len(hits):>8}")
    print(f"\nto the base model, below {least}:")
    texts = OTHERS.read_text(encoding="utf-8")
    shares = []
    for section in texts.split("\n== "):
        kind, _, body = section.removeprefix("== ").partition("\n")
        found = [top(router, text)[2] < least for text in body.split("\n\n") if text.strip()]
        shares += found
        print(f"  {kind:<12}{sum(found):>3} of {len(found)}")
    print(f"  {'all':<12}{statistics.mean(shares):.1%} of {len(shares)}")


def untrained_albert(like: Router, folder: Path) -> Router:
    """An ALBERT of the paper's size over another router's tokenizer and labels; it knows nothing,
    but takes the time of one that does."""
    network = RouterAlbert(read_card(folder).vocab_size, len(like.head.bias)).eval()
    width = network.head.in_features
    head = RouterHead(
        np.zeros((len(like.head.bias), width), np.float32),
        like.head.bias,
        np.zeros((0, width), np.float16),
        np.zeros(0, np.int64),
    )
    return Router(trace_graph(network), head, read_router(folder).tokenizer, like.settings)


def prompts_of(tokens: int, tasks: Sequence[Task], tokenizer: Tokenizer) -> list[str]:
    """The training prompts of so many tokens or more, cut to as many, in random order."""
    prompts = [sample.prompt for task in tasks for sample in task.train]
    found = []
    for prompt in random.Random(7).sample(prompts, len(prompts)):
        offsets = tokenizer.encode(prompt, add_special_tokens=False).offsets
        if len(offsets) >= tokens:
            found.append(prompt[: offsets[tokens - 1][1]])
    return found[:TIMED]


def measure_time(tasks: Sequence[Task], folders: Sequence[Path], albert: bool) -> None:
    """Time the routers in alternation, each prompt once."""
    routers = {folder.name: load(folder)[0] for folder in folders}
    if albert:
        first = next(iter(routers.values()))
        routers["albert"] = untrained_albert(first, folders[0])
    texts = prompts_of(TOKENS, tasks, read_router(folders[0]).tokenizer)
    spent: dict[tuple[str, str], list[float]] = {}
    asked = [("prompt", ""), ("next sentence", "Yes. It is so.\nThe")]
    for number, text in enumerate(texts):
        for name, router in routers.items():
            if name == "albert" and number >= TIMED_SLOW:
                continue
            for kind, generated in asked:
                begun = time.perf_counter()
                router.classify(text, generated)
                spent.setdefault((name, kind), []).append((time.perf_counter() - begun) * 1e3)
    print(f"{len(texts)} prompts of {TOKENS} tokens, ms")
    for (name, kind), times in spent.items():
        p99 = statistics.quantiles(times, n=100)[98]
        print(f"{name:<16}{kind:<16}p50 {statistics.median(times):.3f}  p99 {p99:.3f}")


def measure_adding(tasks_folder: Path, left_out: Sequence[str], examples: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        rest = Path(place) / "tasks"
        shutil.copytree(tasks_folder, rest)
        for name in left_out:
            shutil.rmtree(rest / name)
        train_router(rest, Path(place) / "router")
        router, least = load(Path(place) / "router")
    tasks = read_tasks(tasks_folder)
    others = [task for task in tasks if task.name not in left_out]
    before = _shares(router, others, least)
    for new in (task for task in tasks if task.name in left_out):
        for seed in range(3):
            samples = random.Random(seed).sample(new.train, examples)
            begun = time.perf_counter()
            head = fit_router_row(router, samples)
            seconds = time.perf_counter() - begun
            labels = (*router.labels, new.name)
            after = router.with_head(head, replace(router.settings, labels=labels))
            own, rest_after = _shares(after, [new], least), _shares(after, others, least)
            print(
                f"{new.name:<12}{examples} examples: own {own[0]:.1%} (kept {own[1]:.1%}), others "
                f"{before[0]:.2%} -> {rest_after[0]:.2%} (kept {before[1]:.2%} -> "
                f"{rest_after[1]:.2%}), {seconds:.2f} s"
            )


def _shares(router: Router, tasks: Sequence[Task], least: float) -> tuple[float, float]:
    """Accuracy on the dev prompts, and the share that keeps an adapter."""
    found = [(top(router, sample.prompt), task.name) for task in tasks for sample in task.dev]
    return (
        statistics.mean(label == right for (label, _, _), right in found),
        statistics.mean(confidence >= least for (_, _, confidence), _ in found),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("accuracy", "time", "add"):
        sub = verbs.add_parser(verb)
        sub.add_argument("tasks", type=Path)
        if verb == "accuracy":
            sub.add_argument("router", type=Path)
        elif verb == "time":
            sub.add_argument("routers", type=Path, nargs="+")
            sub.add_argument("--albert", action="store_true", help="an untrained ALBERT, too")
        else:
            sub.add_argument("--left-out", nargs="+", required=True)
            sub.add_argument("--examples", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.verb == "accuracy":
        measure_accuracy(read_tasks(arguments.tasks), arguments.router)
    elif arguments.verb == "time":
        measure_time(read_tasks(arguments.tasks), arguments.routers, arguments.albert)
    else:
        measure_adding(arguments.tasks, arguments.left_out, arguments.examples)


if __name__ == "__main__":
    main()
