"""The rounds: engines in processes of their own take turns at the same work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.engines.prepare import CASES, Contestant
from benchmarks.engines.process import EngineError, Process
from benchmarks.engines.quiet import QUIET, Watch, wait_for_quiet

WARM_TOKENS = 8
TRIES = 3
Found = dict[str, Any]
Measured = tuple[float, dict[str, Any]]  # what others took meanwhile (`Watch`), and the answer


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
        self._others: list[float] = []
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

    @property
    def disturbed(self) -> float:
        """Of all measurements the share in which others took more than QUIET processors."""
        return sum(others > QUIET for others in self._others) / max(1, len(self._others))

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
        """All, but the slow ones in the first round only: a second one would tell no more."""
        return [
            contestant for contestant in self._contestants if number == 1 or not contestant.slow
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
        try:
            found = self._workers[contestant.name, case].ask(order)
        except EngineError as error:
            print(f"{contestant.name}, {case}: {error}", file=sys.stderr)
            return
        self._found[contestant.name]["loss"][case] = found["loss"]

    def _run(self, contestant: Contestant, case: str, recorded: bool) -> None:
        """One turn: answering the short prompt, and for the base model reading the long one."""
        new = self._texts.new if recorded else WARM_TOKENS
        tries = TRIES if recorded else 1
        answer = self._generate(contestant, case, self._texts.short, new, tries)
        own = self._found[contestant.name]
        if answer is not None and recorded:
            own["prefill_ms"].setdefault(case, []).append(1e3 * answer["prefill"])
            own["decode_ms"].setdefault(case, []).append(1e3 * answer["decode"] / (new - 1))
        if case != "base":
            return
        answer = self._generate(contestant, case, self._texts.long, 1, tries)
        if answer is not None and recorded:
            own["long_prefill_ms"].setdefault(case, []).append(1e3 * answer["prefill"])

    def _start_anew(self, contestant: Contestant) -> None:
        """The base model in a new process, with no more adapters and room than it needs."""
        short, new = self._texts.short, self._texts.new
        options = contestant.options_of(["base"]) | {"room": len(short) + new}
        order = {"do": "generate", "ids": short, "adapters": {}, "warm": False}

        def start() -> Measured:
            with Process(contestant.python, options) as process:
                watch = Watch(process.pid)
                first = process.ask(order | {"count": 1})
                others = watch.others()
                process.ask(order | {"count": new})
                peak = process.ask({"do": "peak"})["bytes"]
                return others, {"start": first["clock"] - process.begun, "peak": peak}

        found = self._undisturbed(f"{contestant.name}, start", start, TRIES)
        if found is not None:
            self._found[contestant.name]["start_s"].append(found["start"])
            self._found[contestant.name]["peak_bytes"].append(found["peak"])

    def _generate(
        self, contestant: Contestant, case: str, ids: list[int], count: int, tries: int
    ) -> dict[str, Any] | None:
        order = {"do": "generate", "ids": ids, "count": count, "adapters": CASES[case]}
        worker = self._workers[contestant.name, case]

        def generate() -> Measured:
            watch = Watch(worker.pid)
            answer = worker.ask(order)
            return watch.others(), answer

        title = f"{contestant.name}, {case}, {len(ids)} + {count}"
        return self._undisturbed(title, generate, tries)

    def _undisturbed(
        self, title: str, act: Callable[[], Measured], tries: int
    ) -> dict[str, Any] | None:
        """What `act` found, repeated as long as others worked on the machine meanwhile, the least
        disturbed of so many tries; None, said on stderr, where the engine cannot."""
        found: list[Measured] = []
        while len(found) < tries and (not found or found[-1][0] > QUIET):
            if found:
                wait_for_quiet()
            begun = time.perf_counter()
            try:
                found.append(act())
            except EngineError as error:
                print(f"{title}: {error}", file=sys.stderr)
                return None
            others, seconds = found[-1][0], time.perf_counter() - begun
            print(f"{title}: {seconds:.1f} s, others took {others:.0%}", file=sys.stderr)
        others, answer = min(found, key=lambda measured: measured[0])
        self._others.append(others)
        return answer
