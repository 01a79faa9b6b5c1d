"""The rounds: engines in processes of their own take turns at the same work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.engines.prepare import CASES, Contestant
from benchmarks.engines.process import EngineError, Process

SLOW_ROUNDS = 2
WARM_TOKENS = 8
Found = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    """Token ids: a short prompt to answer with `new` tokens, a long one, and one to judge by."""

    short: list[int]
    long: list[int]
    judged: list[int]
    new: int

    @property
    def room(self) -> int:
        """Tokens of context that the longest work needs."""
        return max(len(self.short) + self.new, len(self.long) + WARM_TOKENS, len(self.judged))


class Match:
    """Everything that is measured of some engines."""

    def __init__(self, contestants: Sequence[Contestant], texts: Texts, rounds: int) -> None:
        self._contestants = contestants
        self._texts = texts
        self._rounds = rounds
        self._found: dict[str, Found] = {
            contestant.name: {
                "settings": contestant.settings,
                "loss": {},
                "decode_ms": {},
                "prefill_ms": {},
                "long_prefill_ms": {},
                "start_s": [],
                "peak_bytes": [],
            }
            for contestant in contestants
        }

    def play(self) -> dict[str, Found]:
        """Measures all of it.

        Returns:
            name -> `loss` (nats a token), `decode_ms` (a token), `prefill_ms`, `long_prefill_ms`
            (the whole prompt) by case; `start_s`, `peak_bytes`. Times are lists, one of each round.
        """
        with ExitStack() as stack:
            self._workers = {
                (contestant.name, case): worker
                for contestant in self._contestants
                for case, worker in self._start(contestant, stack)
            }
            for contestant, case in self._turns("quality", self._contestants):
                self._judge(contestant, case)
            for number in range(self._rounds + 1):  # the first one is to warm up
                title = f"round {number} of {self._rounds}" if number else "warm-up"
                for contestant, case in self._turns(title, self._in_round(number)):
                    self._run(contestant, case, recorded=number > 0)
        for number in range(1, self._rounds + 1):
            print(f"start {number} of {self._rounds}", file=sys.stderr)
            for contestant in self._in_round(number):
                self._start_anew(contestant)
        return self._found

    def _start(self, contestant: Contestant, stack: ExitStack) -> Iterator[tuple[str, Process]]:
        """A process for all cases, or one for each."""
        groups = [contestant.cases] if contestant.shared else [[name] for name in contestant.cases]
        for group in groups:
            options = contestant.options_of(group) | {"room": self._texts.room}
            worker = stack.enter_context(Process(contestant.python, options))
            for case in group:
                yield case, worker

    def _in_round(self, number: int) -> list[Contestant]:
        return [
            contestant
            for contestant in self._contestants
            if number <= SLOW_ROUNDS or not contestant.slow
        ]

    def _turns(
        self, title: str, contestants: Sequence[Contestant]
    ) -> Iterator[tuple[Contestant, str]]:
        """Case by case, the engines one after the other."""
        print(title, file=sys.stderr)
        for case in CASES:
            for contestant in contestants:
                if case in contestant.cases:
                    yield contestant, case

    def _judge(self, contestant: Contestant, case: str) -> None:
        order = {"do": "loss", "ids": self._texts.judged, "adapters": CASES[case]}
        found = self._ask(contestant, case, order)
        if found is not None:
            self._found[contestant.name]["loss"][case] = found["loss"]

    def _run(self, contestant: Contestant, case: str, recorded: bool) -> None:
        """One turn: answering the short prompt, and for the base model reading the long one."""
        new = self._texts.new if recorded else WARM_TOKENS
        answer = self._generate(contestant, case, self._texts.short, new)
        own = self._found[contestant.name]
        if answer is not None and recorded:
            own["prefill_ms"].setdefault(case, []).append(1e3 * answer["prefill"])
            own["decode_ms"].setdefault(case, []).append(1e3 * answer["decode"] / (new - 1))
        if case != "base":
            return
        answer = self._generate(contestant, case, self._texts.long, 1)
        if answer is not None and recorded:
            own["long_prefill_ms"].setdefault(case, []).append(1e3 * answer["prefill"])

    def _start_anew(self, contestant: Contestant) -> None:
        """The base model in a new process, with no more adapters and room than it needs."""
        short, new = self._texts.short, self._texts.new
        options = contestant.options_of(["base"]) | {"room": len(short) + new}
        order = {"do": "generate", "ids": short, "adapters": {}, "warm": False}
        own = self._found[contestant.name]
        with Process(contestant.python, options) as process:
            try:
                first = process.ask(order | {"count": 1})
                process.ask(order | {"count": new})
                peak = process.ask({"do": "peak"})
            except EngineError as error:
                print(f"{contestant.name}: {error}", file=sys.stderr)
                return
        own["start_s"].append(first["clock"] - process.begun)
        own["peak_bytes"].append(peak["bytes"])

    def _generate(
        self, contestant: Contestant, case: str, ids: list[int], count: int
    ) -> dict[str, Any] | None:
        order = {"do": "generate", "ids": ids, "count": count, "adapters": CASES[case]}
        return self._ask(contestant, case, order)

    def _ask(
        self, contestant: Contestant, case: str, order: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The answer; None, said on stderr, where the engine cannot."""
        title, begun = f"{contestant.name}, {case}, {order['do']}", time.perf_counter()
        try:
            answer = self._workers[contestant.name, case].ask(order)
        except EngineError as error:
            print(f"{title}: {error}", file=sys.stderr)
            return None
        print(f"{title}: {time.perf_counter() - begun:.1f} s", file=sys.stderr)
        return answer
