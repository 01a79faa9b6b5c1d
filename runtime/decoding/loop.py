"""The loops around the decoder: one answer as a stream, several at once as a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

from dlp_edge.bundle.adapter_stack import AdapterStack
from dlp_edge.runtime.decoding.answer import Answer
from dlp_edge.runtime.decoding.prompt_lookup import Drafts
from dlp_edge.runtime.engine.backbone import VERIFY_TOKENS, Backbone
from dlp_edge.runtime.engine.decoder import Decoder, Logits
from dlp_edge.runtime.engine.interrupt import Cancelled, Interrupt
from dlp_edge.runtime.fusion.fuser import Fuser, make_fuser
from dlp_edge.runtime.memory import check_address_space
from dlp_edge.types import Chunk


@dataclass(frozen=True)
class Engine:
    """A decoder and what fills its adapter slots, for the same number of sequences.

    Attributes:
        reuse: whether a prompt keeps what the cache has of it already, if it was written under
            the same fusion. Rounding then depends on what came before.
    """

    decoder: Decoder
    fuser: Fuser
    reuse: bool = False


def make_engine(
    backbone: Backbone,
    stack: AdapterStack,
    max_context: int,
    sequences: int = 1,
    reuse: bool = False,
    beside: Engine | None = None,
) -> Engine:
    """An engine whose sequences all have the base model's fusion.

    Args:
        beside: an engine over the same backbone and stack, with which it shares the adapters.
    """
    decoder = Decoder(backbone, max_context, sequences)
    fuser = beside.fuser.sibling(sequences) if beside else make_fuser(backbone, stack, sequences)
    decoder.set_shared_inputs(fuser.shared_inputs)
    decoder.set_fusion(fuser.fuse({}))
    return Engine(decoder, fuser, reuse)


def stream_answer(engine: Engine, answer: Answer, interrupt: Interrupt) -> Iterator[Chunk]:
    """Generates one answer; each chunk belongs to one sentence.

    Args:
        interrupt: ends the answer as "cancelled" in the middle of a pass.
    """
    try:
        drafts = Drafts(answer.prompt_ids) if answer.speculate else None
        rows, draft = _begin(engine, answer, 0, interrupt)[None], list[int]()
        while True:
            yield from _take(engine.decoder, answer, rows, draft, interrupt)
            if answer.done:
                return
            _follow_fusion(engine, answer, 0, interrupt)
            begun = perf_counter()
            draft = _draft(engine.decoder, answer, drafts) if drafts else []
            read = engine.decoder.verify if draft else engine.decoder.step
            rows = read([answer.tokens[-1], *draft], interrupt)
            spent = perf_counter() - begun
            answer.spend(decode=spent, decode_steps=1, drafted=len(draft))
    except Cancelled:
        yield from answer.finish()
    except GeneratorExit:
        raise
    except BaseException:
        # What went wrong may be in the cache already: nothing of it is used again.
        engine.decoder.truncate(0)
        raise


def _draft(decoder: Decoder, answer: Answer, drafts: Drafts) -> list[int]:
    """What may follow an answer's newest token, as far as one pass can check it."""
    if decoder.lengths[0] + VERIFY_TOKENS > decoder.max_context:
        return []
    return drafts.propose(answer.tokens, min(VERIFY_TOKENS, answer.limit - len(answer.tokens)) - 1)


def _take(
    decoder: Decoder, answer: Answer, rows: Logits, draft: list[int], interrupt: Interrupt
) -> Iterator[Chunk]:
    """Lets an answer choose its next tokens, as long as it chooses those drafted: what it would
    be without a draft. The cache forgets the rest of the draft.

    Args:
        rows: the logits [1 + draft, V] after the newest token, and after each one drafted.
    """
    kept = int(decoder.lengths[0]) - len(draft)
    try:
        for row, guess in zip(rows, (*draft, None), strict=True):
            yield from answer.take(row)  # while a consumer holds a chunk no time is counted
            # After a change of fusion all else in the draft was read under the wrong one.
            if answer.done or answer.changed or answer.tokens[-1] != guess:
                return
            interrupt.check()
            answer.spend(accepted=1)
            kept += 1
    finally:
        decoder.truncate(kept)


def run_batch(engine: Engine, answers: Iterable[Answer], interrupt: Interrupt) -> None:
    """Generates answers side by side, as many at a time as the engine has sequences.

    An answer that ends gives its place to the next one. Its seconds of decode are those of the
    passes that it took part in, whole. After an error the engine is of no more use.

    Args:
        interrupt: ends all answers as "cancelled" in the middle of a pass.
    """
    waiting = deque(answers)
    running: list[Answer] = []  # running[i] is on the decoder's sequence i
    try:
        while waiting or running:
            if waiting and len(running) < len(engine.decoder.lengths):
                answer = waiting.popleft()
                running.append(answer)
                answer.take(_begin(engine, answer, len(running) - 1, interrupt))
                if answer.done:
                    running.pop()
            else:
                _step_all(engine, running, interrupt)
    except Cancelled:
        for answer in running:
            answer.finish()


def _step_all(engine: Engine, running: list[Answer], interrupt: Interrupt) -> None:
    """One more token for each running answer; those that it completes leave."""
    for sequence, answer in enumerate(running):
        _follow_fusion(engine, answer, sequence, interrupt)
    begun = perf_counter()
    logits = engine.decoder.step([answer.tokens[-1] for answer in running], interrupt)
    seconds = perf_counter() - begun
    for sequence in reversed(range(len(running))):
        answer = running[sequence]
        answer.spend(decode=seconds, decode_steps=1)
        answer.take(logits[sequence])
        if answer.done:
            _leave(engine, running, sequence)


def _leave(engine: Engine, running: list[Answer], sequence: int) -> None:
    """Closes the gap of an answer that is done with the last one, so that a pass works on none
    in vain."""
    last = len(running) - 1
    if sequence != last:
        engine.decoder.move(last, sequence)
        engine.decoder.set_fusion(engine.fuser.move(last, sequence))
        running[sequence] = running[last]
    running.pop()


def _begin(engine: Engine, answer: Answer, sequence: int, interrupt: Interrupt) -> Logits:
    """Route on the prompt, fuse, prefill."""
    interrupt.check()
    check_address_space()
    answer.begin()
    _fuse(engine, answer, sequence)
    # The last token is read again in any case: its logits are wanted.
    known = engine.decoder.reuse(answer.prompt_ids[:-1], sequence) if engine.reuse else 0
    engine.decoder.truncate(known, sequence)
    begun = perf_counter()
    logits = engine.decoder.prefill(answer.prompt_ids[known:], sequence, interrupt)
    answer.spend(prefill=perf_counter() - begun, reused=known)
    return logits


def _follow_fusion(engine: Engine, answer: Answer, sequence: int, interrupt: Interrupt) -> None:
    """After a change of fusion: fills the slots, and the cache again where the policy says so."""
    if not answer.changed:
        return
    _fuse(engine, answer, sequence)
    if answer.kv == "recompute":
        begun = perf_counter()
        engine.decoder.truncate(0, sequence)
        history = [*answer.prompt_ids, *answer.tokens[:-1]]
        engine.decoder.prefill(history, sequence, interrupt)
        answer.spend(recompute=perf_counter() - begun)


def _fuse(engine: Engine, answer: Answer, sequence: int) -> None:
    begun = perf_counter()
    engine.decoder.set_fusion(engine.fuser.fuse(answer.fusion, sequence))
    engine.decoder.labels[sequence] = frozenset(answer.fusion.items())
    answer.spend(switch=perf_counter() - begun)
