"""Answers with and without `speculate`: their time, and whether they are equal.

    python benchmarks/speculation.py BUNDLE

Two groups of requests to the base model: answers that copy from the prompt (prose, code, a table,
a letter), and answers to the twenty prompts of the export's report, which ask for something new.
In each round every request is answered in both ways, one after the other, in turns which is first.
Prints for each request how much longer decoding takes without: the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from dlp_edge import Reply, Runtime
from dlp_edge.export.greedy import prompts
from dlp_edge.export.report import HELDOUT
from dlp_edge.runtime.decoding import sampling

TABLE = """city, country, inhabitants, founded
Lisbon, Portugal, 545923, -1200
Bergen, Norway, 291940, 1070
Graz, Austria, 302749, 1128
Ghent, Belgium, 265086, 650
Tartu, Estonia, 97435, 1030
Kosice, Slovakia, 229040, 1230"""


def copying() -> dict[str, str]:
    """Requests whose answer is in the prompt for the most part."""
    prose = HELDOUT.read_text(encoding="utf-8").split("\n\n")
    code = inspect.getsource(sampling.penalise)
    again = "Repeat this text word for word:\n\n"
    return {
        "a story, repeated": again + prose[0],
        "an explanation, repeated": again + prose[6],
        "a letter, repeated": again + prose[5],
        "code, repeated": f"Repeat this code word for word:\n\n```python\n{code}```",
        "a table, repeated": again + TABLE,
        "minutes, with another day": "Repeat this text, but with Saturdays instead of Sundays:\n\n"
        + prose[3],
        "a recipe, corrected": "Correct the spelling of this text and change nothing else:\n\n"
        + prose[1].replace("flour", "flower").replace("should", "shuold"),
        "an article, quoted": f"{prose[2]}\n\nCopy the first three sentences of this text.",
    }


@dataclass
class Case:
    """What a request took in the rounds; plain first."""

    replies: list[tuple[Reply, Reply]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether both ways gave the same answer in every round."""
        return all(
            (plain.text, plain.sentences, plain.usage) == (fast.text, fast.sentences, fast.usage)
            for plain, fast in self.replies
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--others", type=int, default=20, help="how many of the other prompts")
    parser.add_argument(
        "--routed", action="store_true", help="the router picks, not the base model"
    )
    parser.add_argument("--show", action="store_true", help="print the answers")
    arguments = parser.parse_args()
    options: dict[str, Any] = {"max_new_tokens": arguments.new_tokens}
    if not arguments.routed:
        options["adapters"] = {}
    groups = {
        "copies": copying(),
        "does not copy": {text: text for text in prompts()[: arguments.others]},
    }
    found = {group: {name: Case() for name in asked} for group, asked in groups.items()}
    with Runtime(arguments.bundle, max_context=2048) as runtime:
        warm_up = next(iter(groups["copies"].values()))
        runtime.generate(warm_up, speculate=True, **options)  # loads what speculation needs
        for turn in range(arguments.rounds):
            for group, asked in groups.items():
                for name, prompt in asked.items():
                    both = {
                        speculate: runtime.generate(prompt, speculate=speculate, **options)
                        for speculate in ((False, True), (True, False))[turn % 2]
                    }
                    found[group][name].replies.append((both[False], both[True]))
                    if arguments.show and not turn:
                        print(f"## {name}\n{both[False].text}\n", file=sys.stderr)
            print(f"round {turn + 1}/{arguments.rounds}", file=sys.stderr)
    _print_table(found)


def _print_table(found: dict[str, dict[str, Case]]) -> None:
    print("| text | tokens | passes | accepted | ratio (rounds) | equal |")
    print("|---|---|---|---|---|---|")
    for group, cases in found.items():
        for name, case in cases.items():
            print(_row(name, [case]))
        print(_row(f"**{group}, all**", list(cases.values())))


def _row(name: str, cases: list[Case]) -> str:
    """A line about one request, or about several as if they were one."""
    first = [case.replies[0][1] for case in cases]
    tokens = sum(reply.usage.completion_tokens for reply in first)
    passes = sum(reply.timings.decode_steps for reply in first)
    accepted = sum(reply.timings.accepted for reply in first)
    drafted = sum(reply.timings.drafted for reply in first)
    ratios = [
        sum(plain.timings.decode for plain, _ in pairs)
        / sum(fast.timings.decode for _, fast in pairs)
        for pairs in zip(*(case.replies for case in cases), strict=True)
    ]
    spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    equal = f"{sum(case.equal for case in cases)} of {len(cases)}"
    return f"| {name} | {tokens} | {passes} | {accepted} of {drafted} | {spread} | {equal} |"


if __name__ == "__main__":
    main()
