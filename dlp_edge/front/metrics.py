"""What a front counts, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

_COUNTERS = {
    "requests": "Chat requests, by HTTP status of their answer.",
    "tokens": "Tokens of answers.",
    "wasted_tokens": "Tokens that arrived with a switch and were dropped.",
    "recomputed_tokens": "Tokens of history sent again at a switch of fusions.",
    "failovers": "Completions that a server lost, taken up again or not.",
}
_SUMMARIES = {
    "first_token_seconds": "From the first completion request of an answer to its first token.",
    "switch_seconds": "The same for one that goes on under another fusion.",
    "failover_seconds": "The same for one that goes on after a server was lost.",
}
_GAUGES = {
    "running": "Requests being answered.",
    "waiting": "Requests that wait for their turn.",
    "upstream_up": "Whether a server was well when it was last asked.",
    "upstream_running": "Completions under way at a server.",
}
PREFIX = "dlp_edge_front_"


class Metrics:
    """Counters and summaries; gauges are read when they are asked for."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._sums: dict[str, float] = defaultdict(float)
        self._times: Counter[str] = Counter()

    def count(self, name: str, amount: int = 1, labels: str = "") -> None:
        self._counts[name, labels] += amount

    def observe(self, name: str, seconds: float) -> None:
        self._times[name] += 1
        self._sums[name] += seconds

    def text(self, gauges: Iterable[tuple[str, str, float]]) -> str:
        """All of it, with gauges as (name, labels, value)."""
        lines: list[str] = []
        for name, what in _COUNTERS.items():
            lines += _head(f"{name}_total", what, "counter")
            found = {labels: n for (of, labels), n in self._counts.items() if of == name}
            lines += [_line(f"{name}_total", labels, n) for labels, n in (found or {"": 0}).items()]
        for name, what in _SUMMARIES.items():
            lines += _head(name, what, "summary")
            lines += [_line(f"{name}_sum", "", self._sums[name])]
            lines += [_line(f"{name}_count", "", self._times[name])]
        given = list(gauges)
        for name, what in _GAUGES.items():
            lines += _head(name, what, "gauge")
            lines += [_line(name, labels, value) for of, labels, value in given if of == name]
        return "\n".join(lines) + "\n"


def _head(name: str, what: str, kind: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {what}", f"# TYPE {PREFIX}{name} {kind}"]


def _line(name: str, labels: str, value: float) -> str:
    return f"{PREFIX}{name}{f'{{{labels}}}' if labels else ''} {value:g}"
