"""All weight formats of one backbone side by side: quality, size and speed.

    pip install matplotlib
    python benchmarks/quantisation.py FILE.gguf --tasks TASKS_DIR --plot docs/quantisation.png

Beside what `--quant` offers it measures the formats of onnxruntime-genai's builder, 4 bits by
plain rounding, and the search that int4 makes for sources off any grid, whatever the source is.
The graphs have no adapter slots. Speed is taken in rounds in which the formats take turns.

Columns: MB of the graph; perplexity over that of fp32 on the held-out text and on the tasks' dev
files; `agreement`, the share of the format's own greedy tokens (20 prompts, 100 tokens each) that
fp32 would choose after the same text; `same_start`, the tokens before the first that it would
not; `equal`, the share of positions with the same token when both run for themselves; median ms
per token; speed over that of int8 (median of the rounds' ratios).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from tokenizers import Tokenizer

from dlp_edge.bundle.adapter_stack import pack
from dlp_edge.bundle.files import BACKBONE
from dlp_edge.bundle.manifest import BackboneEntry
from dlp_edge.export.backbone import FORMATS, DenseBackbone, attention_windows, build_graph
from dlp_edge.export.greedy import NEW_TOKENS, greedy_answers, prompts
from dlp_edge.export.quantisation.quantise import HEAD, Chooser, Quantiser
from dlp_edge.export.quantisation.quantized_matrix import round_int4, round_int8
from dlp_edge.export.report import HELDOUT, Logits, perplexity, step_time
from dlp_edge.export.slots import prepare_graph
from dlp_edge.export.source import Source, load_source
from dlp_edge.models.tasks import read_tasks
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.decoder import Decoder
from dlp_edge.runtime.engine.device import choose_device
from dlp_edge.untrusted.chat_template import ChatTemplate

ROOM = 1024
TASK_SAMPLES = 1  # of each task
BUILDER = {
    "builder int8": ("int8", {}),
    "builder int4": ("int4", {}),
    "builder int4 k_quant_mixed": ("int4", {"algo_config": "k_quant_mixed"}),
}


DIGITS = {
    "MB": 0,
    "heldout": 4,
    "tasks": 4,
    "agreement": 3,
    "same_start": 0,
    "equal": 3,
    "ms": 1,
    "speed": 2,
}


def write_all(source: Source, scratch: Path) -> tuple[dict[str, Path], BackboneEntry]:
    """Write the backbone in every format; returns name -> folder, and a manifest entry."""
    (scratch / "dense").mkdir()
    dense = DenseBackbone(source, [], "cpu", scratch / "dense")
    own: dict[str, Callable[[Path], object]] = {
        name: lambda out, name=name: dense.write(name, out, lambda done: None)
        for name in FORMATS["cpu"]
    }

    def rounded(quantiser: Quantiser) -> Chooser:
        return lambda node, matrix: (round_int8 if node.name == HEAD else round_int4)(
            matrix, quantiser.dtype
        )

    def searched(quantiser: Quantiser) -> Chooser:
        search = dense.searcher(quantiser, on_grid=())
        search.run(lambda done: None)
        return search.choose

    own["int4, rounded"] = lambda out: dense.quantise(out, rounded, lambda done: None)
    own["int4, searched"] = lambda out: dense.quantise(out, searched, lambda done: None)
    folders: dict[str, Path] = {}
    for index, name in enumerate([*own, *BUILDER]):
        print(f"writing {name}", file=sys.stderr)
        folders[name] = scratch / str(index)
        folders[name].mkdir()
        if name in own:
            own[name](folders[name])
            continue
        precision, options = BUILDER[name]
        build_graph(source.folder, precision, "cpu", folders[name], options)
        model = onnx.load(folders[name] / BACKBONE, load_external_data=False)
        prepare_graph(model, [], source.linear_sizes(), attention_windows(source.folder))
        onnx.save(model, folders[name] / BACKBONE)
    return folders, dense.entry("fp32")


class Judge:
    """Compares formats with the fp32 graph."""

    def __init__(self, source: Source, folder: Path, entry: BackboneEntry, tasks: Path | None):
        self._entry = entry
        self._device = choose_device("cpu", "cpu", None)
        self._tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
        self._chat = ChatTemplate(source.chat_template)
        heldout = HELDOUT.read_text(encoding="utf-8")
        self._texts = {"heldout": [self._encode(heldout)[:ROOM]]}
        if tasks is not None:
            self._texts["tasks"] = self._task_windows(tasks)
        self.tokens = {name: sum(map(len, texts)) for name, texts in self._texts.items()}
        self._asked = [self._encode(self._render(prompt)) for prompt in prompts()]
        self._source = self.decoder(folder)
        self._before = self._losses(self._source)
        self._answers = np.asarray(self._greedy(folder))

    def decoder(self, folder: Path) -> Decoder:
        return self._engine(folder, ROOM, 1).decoder

    def _engine(self, folder: Path, room: int, sequences: int) -> Engine:
        graph = open_backbone(folder / BACKBONE, self._entry, self._device)
        return make_engine(graph, pack({}, self._entry.dtype), room, sequences)

    def quality(self, folder: Path, decoder: Decoder) -> dict[str, float]:
        """Perplexity relative to fp32 on each text, and agreement of the greedy answers."""
        after = self._losses(decoder)
        answers = np.asarray(self._greedy(folder))
        equal = answers == self._answers
        expected = [
            self._logits(self._source, [*ids, *answer[:-1]])[len(ids) - 1 :].argmax(1)
            for ids, answer in zip(self._asked, answers.tolist(), strict=True)
        ]
        return {
            **{name: float(np.exp(after[name] - loss)) for name, loss in self._before.items()},
            "agreement": float((answers == np.asarray(expected)).mean()),
            "same_start": float(np.mean([np.append(row, False).argmin() for row in equal])),
            "equal": float(equal.mean()),
        }

    def time(self, decoder: Decoder) -> float:
        return step_time(decoder, self._texts["heldout"][0])

    def _greedy(self, folder: Path) -> list[list[int]]:
        room = max(map(len, self._asked)) + NEW_TOKENS
        engine = self._engine(folder, room, len(self._asked))
        return greedy_answers(engine, self._asked, NEW_TOKENS)

    def _losses(self, decoder: Decoder) -> dict[str, float]:
        """Mean negative log likelihood of each kind of text."""
        return {
            name: float(
                np.average(
                    [np.log(perplexity(self._logits(decoder, ids), ids)) for ids in texts],
                    weights=[len(ids) - 1 for ids in texts],
                )
            )
            for name, texts in self._texts.items()
        }

    def _logits(self, decoder: Decoder, ids: Sequence[int]) -> Logits:
        decoder.truncate(0)
        return decoder.all_logits(ids)

    def _task_windows(self, folder: Path) -> list[list[int]]:
        """Requests with their answers from all tasks, in windows of up to ROOM tokens."""
        windows: list[list[int]] = [[]]
        for task in read_tasks(folder):
            for sample in task.dev[:TASK_SAMPLES]:
                ids = self._encode(self._render(sample.prompt) + sample.response)
                if len(ids) > ROOM:
                    continue
                if len(windows[-1]) + len(ids) > ROOM:
                    windows.append([])
                windows[-1].extend(ids)
        return windows

    def _render(self, prompt: str) -> str:
        return self._chat.render([{"role": "user", "content": prompt}])

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone", help="folder, GGUF file or hub id")
    parser.add_argument("--tasks", type=Path, help="judge on their dev files as well")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plot", type=Path, help="write the Pareto plot there (PNG)")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        load_source(arguments.backbone) as source,
    ):
        folders, entry = write_all(source, Path(scratch))
        judge = Judge(source, folders["fp32"], entry, arguments.tasks)
        decoders = {name: judge.decoder(folder) for name, folder in folders.items()}
        rows: dict[str, dict[str, float]] = {}
        for name, folder in folders.items():
            print(f"judging {name}", file=sys.stderr)
            size = sum(path.stat().st_size for path in folder.glob(f"{BACKBONE}*"))
            rows[name] = {"MB": size / 1e6, **judge.quality(folder, decoders[name])}
        times: dict[str, list[float]] = {name: [] for name in decoders}
        for number in range(arguments.rounds):
            for name, decoder in decoders.items():
                times[name].append(judge.time(decoder))
            print(f"round {number + 1}/{arguments.rounds}", file=sys.stderr)
    for name, found in times.items():
        rows[name]["ms"] = statistics.median(found)
        rows[name]["speed"] = statistics.median(
            base / mine for base, mine in zip(times["int8"], found, strict=True)
        )
    print(json.dumps({"tokens": judge.tokens, "rounds": arguments.rounds}), file=sys.stderr)
    print_table(rows)
    if arguments.plot:
        plot(rows, arguments.plot)


def print_table(rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"| format | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[key]:.{DIGITS[key]}f}' for key in columns)} |")


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Perplexity over speed, the area of a point being its size; no point lies right of and below
    a point of the line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    best = np.inf
    front = []
    for row in sorted(rows.values(), key=lambda row: row["ms"]):
        if row["heldout"] < best:
            best = row["heldout"]
            front.append((row["ms"], row["heldout"]))
    axes.step(*zip(*front, strict=True), where="post", color="0.8", zorder=0)
    for name, row in rows.items():
        axes.scatter(row["ms"], row["heldout"], s=row["MB"])
        place = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 8, "rotation": 30}
        axes.annotate(f"{name}, {row['MB']:.0f} MB", (row["ms"], row["heldout"]), **place)
    axes.axhline(1.02, color="tab:red", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.margins(0.12, 0.15)  # room for the names
    axes.set_xlabel("ms per token (two threads)")
    axes.set_ylabel("perplexity / fp32, held-out text")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
