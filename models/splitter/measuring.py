"""How well a request splitter takes held-out prompts apart."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from dlp_edge.models.splitter.composites import Composite, CompositeMaker
from dlp_edge.models.splitter.network import SplitterNetwork
from dlp_edge.models.tasks import Task
from dlp_edge.runtime.routing.request_splitter import Split, requests_of
from dlp_edge.runtime.routing.splitter_input import splitter_input

SINGLES, COMPOSITES = 400, 100
CLOSE = 18  # characters that an edge may be off: a mark or a connector more or less


def measure_splitter(
    network: SplitterNetwork, tokenizer: Tokenizer, tasks: Sequence[Task], seed: int
) -> dict[str, float]:
    """The share of held-out prompts whose requests are all found, by kind of prompt."""
    found = {}
    for bare in (False, True):
        for count in (1, 2, 3, 4):
            if count > len(tasks):
                continue
            maker = CompositeMaker(tasks, "dev", random.Random(seed))
            drawn = [
                maker.held_out(count, bare, unseen_joins=False)
                for _ in range(SINGLES if count == 1 else COMPOSITES)
            ]
            right = sum(is_right(split_by(network, tokenizer, each.text), each) for each in drawn)
            found[f"{count}, bare" if bare else str(count)] = round(right / len(drawn), 4)
    return found


def split_by(network: SplitterNetwork, tokenizer: Tokenizer, text: str) -> Split:
    """The requests of a text, by a network in torch."""
    tokens = splitter_input(text, tokenizer.encode(text, add_special_tokens=False))
    ids, gaps = torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.gaps)[None]
    with torch.no_grad():
        scores = network(ids, gaps, torch.ones(ids.shape))[0].numpy()
    return requests_of(text, tokens, scores)


def is_right(split: Split, composite: Composite) -> bool:
    """Whether exactly the composite's requests were found. Thanks at the end may be a part of the
    last one."""
    if len(split.requests) != len(composite.spans):
        return False
    pairs = list(zip(split.requests, composite.spans, strict=True))
    return len(pairs) == 1 or (
        all(abs(found.start - span.start) <= CLOSE for found, span in pairs)
        and all(abs(found.end - span.end) <= CLOSE for found, span in pairs[:-1])
    )
