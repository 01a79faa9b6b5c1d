"""The life of an answer: route, fuse, prefill, then token by token to the next sentence.

`answer_steps` is the whole way, top to bottom; `stream_batch` takes it for several
answers at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from time import perf_counter

from dlp_edge.runtime.decoding.answer import Answer, Step
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.engine.backbone import VERIFY_TOKENS
from dlp_edge.runtime.engine.decoder import Logits
from dlp_edge.runtime.engine.interrupt import Cancelled, Interrupt
from dlp_edge.runtime.memory import check_address_space
from dlp_edge.types import Chunk


def stream_answer(engine: Engine, answer: Answer, interrupt: Interrupt) -> Iterator[Chunk]:
    """Generates one answer; each chunk belongs to one sentence. See `answer_steps`."""
    for chunks in answer_steps(engine, answer, interrupt):
        yield from chunks


def answer_steps(
    engine: Engine, answer: Answer, interrupt: Interrupt
) -> Generator[list[Chunk], None, None]:
    """Generates one answer; yields the chunks of each of its tokens.

    Closed between two tokens, it leaves a cache of all tokens but the newest, and another engine
    can go on from there.

    A pass reads the newest token and, where the answer copies, a draft of the following ones:
    these are kept as long as they are what the answer samples anyway.

    Args:
        interrupt: ends the answer as "cancelled" in the middle of a pass.
    """
    decoder = engine.decoder
    try:
        logits = _begin(engine, answer, 0, interrupt)[None]  # route on the prompt, fuse, prefill
        draft: list[int] = []
        while True:
            cached = int(decoder.lengths[0]) - len(draft)
            try:
                for row, drafted in zip(logits, (*draft, None), strict=True):
                    step = answer.take(row, drafted)
                    yield step.chunks  # no time is counted while a consumer holds a chunk
                    if not step.as_drafted:
                        break
                    interrupt.check()
                    answer.record(accepted=1)
                    cached += 1
            finally:
                decoder.truncate(cached)  # drops the draft's other tokens
            if answer.done:
                engine.remember(0)
                return
            draft = answer.draft(VERIFY_TOKENS)
            if step.fusion is not None:  # a sentence starts under other adapters
                _refuse(engine, answer, step.fusion, 0, interrupt)
            started = perf_counter()
            forward = decoder.verify if draft else decoder.step
            logits = forward([answer.tokens[-1], *draft], interrupt)
            answer.record(decode=perf_counter() - started, decode_steps=1, drafted=len(draft))
    except Cancelled:
        yield answer.finish()
    except GeneratorExit:
        raise
    except BaseException:
        # The cache may hold what went wrong: nothing of it is used again.
        decoder.truncate(0)
        raise


def _begin(engine: Engine, answer: Answer, sequence: int, interrupt: Interrupt) -> Logits:
    """Routes on the prompt, fuses, and prefills; returns the logits [V] after the prompt."""
    interrupt.check()
    check_address_space()
    fusion = answer.begin()
    started = perf_counter()
    engine.fuse(fusion, sequence)
    fused = perf_counter()
    logits, reused = engine.prefill(answer.prompt_ids, sequence, interrupt)
    answer.record(switch=fused - started, prefill=perf_counter() - fused, reused=reused)
    return logits


def _refuse(
    engine: Engine, answer: Answer, fusion: dict[str, float], sequence: int, interrupt: Interrupt
) -> None:
    """At a sentence start: fills the slots, and the cache again where the KV policy says so."""
    started = perf_counter()
    engine.fuse(fusion, sequence)
    answer.record(switch=perf_counter() - started)
    if answer.kv == "recompute":
        started = perf_counter()
        engine.recompute([*answer.prompt_ids, *answer.tokens[:-1]], sequence, interrupt)
        answer.record(recompute=perf_counter() - started)


def run_batch(engine: Engine, answers: Iterable[Answer], interrupt: Interrupt) -> None:
    """Generates answers side by side; see `stream_batch`."""
    waiting = deque(answers)
    for _ in stream_batch(engine, lambda: waiting.popleft() if waiting else None, interrupt):
        pass


def stream_batch(
    engine: Engine, next_answer: Callable[[], Answer | None], interrupt: Interrupt
) -> Iterator[list[tuple[Answer, list[Chunk]]]]:
    """Generates answers side by side, as many at a time as the engine has sequences; yields the
    chunks of each after every pass.

    An answer that ends gives its sequence to the next one. Its seconds of decode are those of the
    passes that it took part in, whole. After an error the engine cannot be used again.

    Args:
        next_answer: the next answer to begin; None if there is none now. It is asked whenever a
            sequence is free, so that an answer may wait for the end of another.
        interrupt: ends all answers as "cancelled" in the middle of a pass.
    """
    running: list[Answer] = []  # running[i] is on the decoder's sequence i
    try:
        while True:
            free = len(running) < len(engine.decoder.lengths)
            answer = next_answer() if free else None
            if answer is not None:
                running.append(answer)
                sequence = len(running) - 1
                step = answer.take(_begin(engine, answer, sequence, interrupt))
                _follow(engine, running, sequence, step, interrupt)
                yield [(answer, step.chunks)]
            elif running:
                yield _step_all(engine, running, interrupt)
            else:
                return
    except Cancelled:
        yield [(answer, answer.finish()) for answer in running]


def _step_all(
    engine: Engine, running: list[Answer], interrupt: Interrupt
) -> list[tuple[Answer, list[Chunk]]]:
    """One more token for each running answer; those that it completes leave."""
    started = perf_counter()
    logits = engine.decoder.step([answer.tokens[-1] for answer in running], interrupt)
    seconds = perf_counter() - started
    for answer in running:
        answer.record(decode=seconds, decode_steps=1)
    # All rows are sampled before anything is prefilled again: that overwrites the logits.
    steps = [answer.take(row) for answer, row in zip(running, logits, strict=True)]
    given = [(answer, step.chunks) for answer, step in zip(running, steps, strict=True)]
    for sequence in reversed(range(len(running))):
        _follow(engine, running, sequence, steps[sequence], interrupt)
    return given


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
