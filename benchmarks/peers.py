"""dlp-edge beside its peers: one backbone, the same adapters, prompts and lengths, in one run.

    python -m benchmarks.peers FILE.gguf --adapters DIR --bundle int4=BUNDLE --bundle int8=BUNDLE \\
        --python llama=ENV/bin/python --python openvino=ENV/bin/python --json FILE --plot FILE.png

From the root of a checkout, in an environment with the `export` extra. DIR may hold PEFT adapters
stratqa, unitconv (r = 8 on q and v) and gsm8k (r = 16 on all matrices); what it lacks is made up of
random numbers. Each engine runs in processes of its own. Two need environments of their own, and
are left out where no interpreter is given (llama-cpp-python as it builds itself for the machine):

    python -m venv llama && llama/bin/pip install llama-cpp-python==0.3.36 numpy
    python -m venv openvino && openvino/bin/pip install openvino-genai==2026.4.1 numpy

In every round and for every case the engines take turns, each after a short warm-up: 256 tokens
are read and 128 written; then 2,000 are read. A last part starts each engine anew: time from the
start of the process to the first token after 256, and the most memory it took for 128 more.
Perplexity is measured through each engine on 512 tokens of prose, over that of transformers + PEFT
with the same adapters. What was measured while other processes worked is measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.engines.match import Match, Texts
from benchmarks.engines.prepare import CASES, Contestant, Kitchen
from benchmarks.engines.summary import EXACT, plot, print_tables, summarise
from dlp_edge.export.report import HELDOUT
from dlp_edge.runtime.engine.device import choose_device

ENGINES = ("dlp", "llama", "genai", "openvino", "torch", "paper")
SHORT, LONG, NEW, JUDGED = 256, 2000, 128, 512  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone", type=Path, metavar="FILE.gguf")
    parser.add_argument("--adapters", type=Path, metavar="DIR")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=BUNDLE")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=INTERPRETER")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=choose_device("cpu", "cpu", None).threads)
    parser.add_argument(
        "--files", type=Path, metavar="DIR", help="keep what the engines read there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        folder = arguments.files or Path(scratch)
        folder.mkdir(exist_ok=True)
        kitchen = Kitchen(arguments.backbone, arguments.adapters, arguments.threads, folder)
        tokenizer = Tokenizer.from_file(str(kitchen.dense / "tokenizer.json"))
        contestants = list(invite(kitchen, arguments))
        match = Match(contestants, texts(tokenizer), arguments.rounds)
        document = {
            "backbone": arguments.backbone.stem,
            "processor": processor(),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "tokens": {"short": SHORT, "long": LONG, "new": NEW, "judged": JUDGED},
            "cases": {name: dict(fusion) for name, fusion in CASES.items()},
            "engines": match.play(),
            "augmented": match.augmented,
        }
    document["ratios"] = summarise(document["engines"])
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print_tables(document)
    if arguments.plot:
        plot(document, arguments.plot)


def invite(kitchen: Kitchen, arguments: argparse.Namespace) -> Iterator[Contestant]:
    """Every engine that was asked for and can be run, with what it reads."""
    pythons = {"genai": sys.executable, "torch": sys.executable, "paper": sys.executable}
    pythons |= {"dlp": sys.executable} | _named(arguments.python)
    for engine in arguments.engines:
        python = pythons.get(engine)
        if python is None:
            print(f"{engine} is left out: --python {engine}=INTERPRETER", file=sys.stderr)
            continue
        if engine == "dlp":
            for name, bundle in _named(arguments.bundle).items():
                yield kitchen.dlp(name, Path(bundle), python)
        elif engine in ("llama", "genai", "openvino"):
            for quantisation in ("int4", "int8"):
                yield getattr(kitchen, engine)(quantisation, python)
        elif engine == "torch":
            settings = "fp32; the adapters concatenated into one (add_weighted_adapter, cat)"
            yield kitchen.torch("transformers_peft", EXACT, python, settings)
        else:
            settings = "fp32, in torch; with a KV cache"
            yield kitchen.torch("paper", "loop over adapters", python, settings)


def texts(tokenizer: Tokenizer) -> Texts:
    """Prose that no engine was calibrated on, again and again for the long prompt."""
    prose = HELDOUT.read_text(encoding="utf-8")
    ids = tokenizer.encode(prose, add_special_tokens=False).ids
    long = list(islice(cycle(ids), LONG))
    return Texts(long[:SHORT], long, ids[:JUDGED], NEW)


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _named(pairs: list[str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in pairs)


if __name__ == "__main__":
    main()
