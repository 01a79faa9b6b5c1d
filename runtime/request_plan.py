"""Which requests of a prompt are answered on their own, and what each is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dlp_edge.errors import UsageError
from dlp_edge.runtime.decoding.request_answers import PlannedRequest
from dlp_edge.runtime.request import RequestOptions
from dlp_edge.runtime.routing.request_splitter import RequestSplitter
from dlp_edge.types import Message, Request, RouteDecision


def find_requests(splitter: RequestSplitter | None, prompt: str) -> tuple[PlannedRequest, ...]:
    """The requests of a prompt; the whole prompt if it is one, or nothing can split it."""
    split = splitter.split(prompt) if splitter is not None else None
    if split is None or len(split.requests) == 1:
        return (PlannedRequest(prompt, 0, len(prompt), prompt, None),)
    before = ""
    if split.introduction is not None:
        start, end = split.introduction
        before = prompt[start:end] + "\n"
    return tuple(
        PlannedRequest(
            prompt[span.start : span.end],
            span.start,
            span.end,
            before + prompt[span.start : span.end],
            index - 1 if span.leans else None,
        )
        for index, span in enumerate(split.requests)
    )


def route_requests(
    splitter: RequestSplitter | None,
    prompt: str,
    decide: Callable[[str], RouteDecision | None],
) -> tuple[Request, ...]:
    """The requests of a prompt, each with the decision for what the model reads of it."""
    return tuple(
        Request(each.text, each.start, each.end, decide(each.asked), each.leans_on)
        for each in find_requests(splitter, prompt)
    )


def plan_requests(
    splitter: RequestSplitter | None, messages: Sequence[Message], options: RequestOptions
) -> tuple[tuple[PlannedRequest, ...], list[Message]] | None:
    """The requests of the last message, and the messages before it; None if it is answered whole.

    Raises:
        UsageError: `requests="apart"`, and the bundle has no request splitter.
    """
    if options.requests == "together" or options.raw or messages[-1]["role"] != "user":
        return None
    if options.requests == "auto":
        # One JSON document or call is asked for, or the application has decided who answers.
        decided = options.decoding.json_schema is not None or options.routing.pinned is not None
        if decided or options.tools is not None:
            return None
    elif splitter is None:
        raise UsageError(
            "the bundle has no request splitter",
            'Train the router again and export with it, or leave out requests="apart"',
        )
    requests = find_requests(splitter, messages[-1]["content"])
    if len(requests) == 1:
        return None
    if options.requests == "apart":
        requests = tuple(
            PlannedRequest(each.text, each.start, each.end, each.asked, None) for each in requests
        )
    return requests, list(messages[:-1])
