"""The life of an answer: route, fuse, prefill, then token by token to the next sentence.

`stream_answer` is the whole way, top to bottom; `run_batch` takes it for several answers at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

from dlp_edge.bundle.adapter_stack import AdapterStack
from dlp_edge.runtime.decoding.answer import Answer, Step
from dlp_edge.runtime.decoding.prompt_lookup import PromptLookup
from dlp_edge.runtime.engine.backbone import ROWS, Backbone
from dlp_edge.runtime.engine.decoder import Decoder, Logits
from dlp_edge.runtime.engine.interrupt import Cancelled, Interrupt
from dlp_edge.runtime.fusion.copying import Fuser
from dlp_edge.runtime.fusion.in_place import SpanFuser
from dlp_edge.runtime.fusion.on_device import DeviceFuser
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
    fuser: Fuser | SpanFuser | DeviceFuser
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
    fuser = beside.fuser.sibling(sequences) if beside else _fuser(backbone, stack, sequences)
    if isinstance(fuser, SpanFuser):
        decoder.set_adapters(fuser.adapters)
    decoder.set_fusion(fuser.fuse({}))
    return Engine(decoder, fuser, reuse)


def _fuser(
    backbone: Backbone, stack: AdapterStack, sequences: int
) -> Fuser | SpanFuser | DeviceFuser:
    entry, device = backbone.entry, backbone.device
    if backbone.own_operators:
        return SpanFuser(stack, entry.slots, sequences)
    if device.kind == "cpu":
        return Fuser(stack, entry.slots, entry.dtype, sequences)
    return DeviceFuser(stack, entry.slots, entry.dtype, device, sequences)


def stream_answer(engine: Engine, answer: Answer, interrupt: Interrupt) -> Iterator[Chunk]:
    """Generates one answer; each chunk belongs to one sentence.

    Args:
        interrupt: ends the answer as "cancelled" in the middle of a pass.
    """
    decoder = engine.decoder
    try:
        lookup = PromptLookup(answer.prompt_ids) if answer.speculate else None
        draft: list[int] = []
        logits = _prefill(engine, answer, 0, interrupt)[None]  # route on the prompt, fuse, prefill
        while True:
            # Sample; the text up to the next sentence start, and the fusion from there on.
            fusion = yield from _accept(decoder, answer, logits, draft, interrupt)
            if answer.done:
                return
            if fusion is not None:
                _refuse(engine, answer, fusion, 0, interrupt)
            started = perf_counter()
            draft = _draft(decoder, answer, lookup) if lookup else []
            forward = decoder.verify if draft else decoder.step
            logits = forward([answer.tokens[-1], *draft], interrupt)
            answer.record(decode=perf_counter() - started, decode_steps=1, drafted=len(draft))
    except Cancelled:
        yield from answer.finish()
    except GeneratorExit:
        raise
    except BaseException:
        # The cache may hold what went wrong: nothing of it is used again.
        decoder.truncate(0)
        raise


def _prefill(engine: Engine, answer: Answer, sequence: int, interrupt: Interrupt) -> Logits:
    """Routes on the prompt, fuses, and prefills; returns the logits [V] after the prompt."""
    interrupt.check()
    check_address_space()
    _fuse(engine, answer, answer.begin(), sequence)
    # The last token is read again in any case: its logits are wanted.
    reused = engine.decoder.reuse(answer.prompt_ids[:-1], sequence) if engine.reuse else 0
    engine.decoder.truncate(reused, sequence)
    started = perf_counter()
    logits = engine.decoder.prefill(answer.prompt_ids[reused:], sequence, interrupt)
    answer.record(prefill=perf_counter() - started, reused=reused)
    return logits


def _accept(
    decoder: Decoder, answer: Answer, logits: Logits, draft: list[int], interrupt: Interrupt
) -> Generator[Chunk, None, dict[str, float] | None]:
    """Samples the next token, and the following ones as long as they are those drafted: the
    answer is what it would be without a draft. Removes the rest of the draft from the cache.

    Args:
        logits: [1 + draft, V], after the newest token and after each one drafted.

    Returns:
        The fusion of the next sentence, where the last token changed it.
    """
    cached = int(decoder.lengths[0]) - len(draft)
    try:
        for row, drafted in zip(logits, (*draft, None), strict=True):
            step = answer.take(row)
            yield from step.chunks  # no time is counted while a consumer holds a chunk
            # After a change of fusion the rest of the draft was read under the wrong one.
            if answer.done or step.fusion is not None or answer.tokens[-1] != drafted:
                break
            interrupt.check()
            answer.record(accepted=1)
            cached += 1
    finally:
        decoder.truncate(cached)
    return step.fusion


def _refuse(
    engine: Engine, answer: Answer, fusion: dict[str, float], sequence: int, interrupt: Interrupt
) -> None:
    """At a sentence start: fills the slots, and the cache again where the KV policy says so."""
    _fuse(engine, answer, fusion, sequence)
    if answer.kv == "recompute":
        started = perf_counter()
        engine.decoder.truncate(0, sequence)
        history = [*answer.prompt_ids, *answer.tokens[:-1]]
        engine.decoder.prefill(history, sequence, interrupt)
        answer.record(recompute=perf_counter() - started)


def _fuse(engine: Engine, answer: Answer, fusion: dict[str, float], sequence: int) -> None:
    started = perf_counter()
    engine.decoder.set_fusion(engine.fuser.fuse(fusion, sequence))
    engine.decoder.labels[sequence] = frozenset(fusion.items())
    answer.record(switch=perf_counter() - started)


def _draft(decoder: Decoder, answer: Answer, lookup: PromptLookup) -> list[int]:
    """Tokens that may follow, as many as one pass can verify."""
    if decoder.lengths[0] + ROWS > decoder.max_context:
        return []
    return lookup.propose(answer.tokens, min(ROWS, answer.limit - len(answer.tokens)) - 1)


def run_batch(engine: Engine, answers: Iterable[Answer], interrupt: Interrupt) -> None:
    """Generates answers side by side, as many at a time as the engine has sequences.

    An answer that ends gives its sequence to the next one. Its seconds of decode are those of the
    passes that it took part in, whole. After an error the engine cannot be used again.

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
                sequence = len(running) - 1
                step = answer.take(_prefill(engine, answer, sequence, interrupt))
                _follow(engine, running, sequence, step, interrupt)
            else:
                _step_all(engine, running, interrupt)
    except Cancelled:
        for answer in running:
            answer.finish()


def _step_all(engine: Engine, running: list[Answer], interrupt: Interrupt) -> None:
    """One more token for each running answer; those that it completes leave."""
    started = perf_counter()
    logits = engine.decoder.step([answer.tokens[-1] for answer in running], interrupt)
    seconds = perf_counter() - started
    for answer in running:
        answer.record(decode=seconds, decode_steps=1)
    # All rows are sampled before anything is prefilled again: that overwrites the logits.
    steps = [answer.take(row) for answer, row in zip(running, logits, strict=True)]
    for sequence in reversed(range(len(running))):
        _follow(engine, running, sequence, steps[sequence], interrupt)


def _follow(
    engine: Engine, running: list[Answer], sequence: int, step: Step, interrupt: Interrupt
) -> None:
    """Does what an answer's newest token asks for: leave, or the next sentence's fusion."""
    answer = running[sequence]
    if answer.done:
        _leave(engine, running, sequence)
    elif step.fusion is not None:
        _refuse(engine, answer, step.fusion, sequence, interrupt)


def _leave(engine: Engine, running: list[Answer], sequence: int) -> None:
    """Moves the last answer into the place of one that is done, so that no pass works in vain."""
    last = len(running) - 1
    if sequence != last:
        engine.decoder.move(last, sequence)
        engine.decoder.set_fusion(engine.fuser.move(last, sequence))
        running[sequence] = running[last]
    running.pop()
