"""`Runtime`: a bundle, loaded; the only part that knows the order of the others."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from dlp_edge.bundle.bundle import Bundle, open_bundle
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.bundle.signing import TrustedKey
from dlp_edge.checks import check_number
from dlp_edge.errors import UsageError
from dlp_edge.runtime.adapters.edit import Examples, add_skill, remove_skill
from dlp_edge.runtime.decoding.answer import Answer
from dlp_edge.runtime.decoding.loop import make_engine, run_batch
from dlp_edge.runtime.engine.device import choose_device
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.engine.ort_errors import ANSWERING, CHANGING, LOADING, let_go, memory_for
from dlp_edge.runtime.loaded_bundle import Loaded, Progress, read
from dlp_edge.runtime.memory import estimate, release_memory, trim
from dlp_edge.runtime.options import (
    GenerateOptions,
    RouteOptions,
    check_callable,
    check_each,
    check_option_names,
)
from dlp_edge.runtime.routing.policy import route_with
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.session import Host, Session, Start, load_session
from dlp_edge.runtime.stream import AsyncStream, Stream, Turn
from dlp_edge.runtime.text.prompt import check_messages, check_prompt
from dlp_edge.types import (
    AdapterInfo,
    Estimate,
    Likelihood,
    Message,
    Overflow,
    Reply,
    RouteDecision,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Runtime:
    """A loaded bundle that answers prompts.

    Args:
        path: the bundle's folder.
        device: "auto" (what the bundle was exported for), "cpu" or "cuda".
        max_context: room for prompt and answer in tokens, at most the backbone's own context.
        threads: processor threads; None takes what this process may use, 8 at most.
        on_progress: called with (stage, fraction) while loading; an exception that it raises
            ends the loading and is passed on.
        cache_budget: bytes for the caches of all sessions; beyond it the session that spoke
            longest ago loses its own and reads its conversation again. None: no limit.
        trusted_key: an Ed25519 public key (a PEM file, its content, or the raw 32 bytes) that the
            bundle must be signed with; None takes any bundle. Needs the extra `sign`.

    Raises:
        BundleError: the bundle is missing, damaged, of another version, or not signed with the
            trusted key.
        DeviceError: the device is not there.
        ResourceError: not enough memory.

    Safe to use from several threads: requests wait for each other.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "auto",
        max_context: int = 4096,
        threads: int | None = None,
        on_progress: Progress | None = None,
        cache_budget: int | None = None,
        trusted_key: str | os.PathLike[str] | bytes | None = None,
    ) -> None:
        check_callable("on_progress", on_progress)
        tell = on_progress or (lambda stage, fraction: None)
        numbers = {"max_context": max_context, "threads": threads, "cache_budget": cache_budget}
        for name, value in numbers.items():
            if value is not None:
                check_number(name, value, whole=True)
                if value < 1:
                    raise UsageError(f"{name} is {value}", "Choose at least 1")
        self._process = os.getpid()
        self._closing = Interrupt()
        self._turn = Turn()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._streams_lock = threading.Lock()
        self._loaded: Loaded | None = None
        self._trusted = None if trusted_key is None else TrustedKey(trusted_key)
        try:
            with memory_for(LOADING):
                tell("manifest", 0.0)
                self._bundle = open_bundle(path, self._trusted)
                self.device = choose_device(device, self._bundle.manifest.target, threads)
                self._loaded = read(self._bundle, self.device, max_context, cache_budget, tell)
                trim()  # onnxruntime has packed the weights; as they were read they are waste
                tell("ready", 1.0)
        except BaseException as error:
            self._loaded = None
            let_go(error)
            release_memory()
            raise

    @staticmethod
    def estimate(path: str | Path, max_context: int = 4096) -> Estimate:
        """What loading a bundle will take, before it is loaded.

        Raises:
            BundleError: it is no bundle.
        """
        return estimate(path, max_context)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._bundle.manifest

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The bundle's adapters, in its order."""
        router = self.manifest.router
        labels = router.settings.labels if router else ()
        return tuple(
            AdapterInfo(entry.name, entry.rank, entry.target_modules, entry.name in labels)
            for entry in self.manifest.adapters
        )

    def generate(
        self, prompt: str | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> Reply:
        """Answers a prompt (text, or chat messages); see `GenerateOptions`.

        Raises:
            UsageError: an option or adapter name is wrong, or the prompt is empty.
            ContextLengthError: the prompt is longer than the context.
        """
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: str | Sequence[Message], **options: Unpack[GenerateOptions]) -> Stream:
        """Like `generate`, piece by piece: an iterator of `Chunk` with `.cancel()` and, at its
        end, `.reply`."""
        loaded = self._open()
        answer = loaded.prepare(prompt, options)
        return self._watch(Stream(lambda: loaded.engine, answer, self._turn, _waits(options)))

    def astream(
        self, prompt: str | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """`stream` for asyncio: `async for chunk in rt.astream(...)`. The generation runs on a
        thread of its own; cancelling the task cancels it."""
        return AsyncStream(self.stream(prompt, **options))

    def session(
        self,
        system: str | None = None,
        messages: Sequence[Message] = (),
        overflow: Overflow = "error",
    ) -> Session:
        """A conversation that keeps its history and its cache.

        Args:
            system: the system message.
            messages: what was said before.
            overflow: see `Session`.

        Raises:
            UsageError: the messages are none, or the policy is unknown.
        """
        start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._open()
        return Session(self._host(), [*check_messages(start), *check_messages(messages)], overflow)

    def load_session(self, path: str | Path) -> Session:
        """The conversation that `Session.save` wrote; see `session`."""
        self._open()
        return load_session(self._host(), path)

    @memory_for(ANSWERING)
    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Message]],
        each: Sequence[GenerateOptions] | None = None,
        max_batch: int = 8,
        **options: Unpack[GenerateOptions],
    ) -> list[Reply]:
        """Answers several prompts side by side, each with its own routing and fusion: the batched
        GEMM of eq. 6. Greedy answers are those of `generate`, up to rounding.

        Args:
            each: options of each prompt, over the common ones.
            max_batch: the most prompts at a time; each takes a KV cache of its own.

        Raises:
            UsageError, ContextLengthError: as `generate`, before anything is generated.
        """
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
            raise UsageError(
                f"the prompts are {type(prompts).__name__}, no list", "Give a list of prompts"
            )
        check_number("max_batch", max_batch, whole=True)
        if max_batch < 1:
            raise UsageError(f"max_batch is {max_batch}", "Choose at least 1")
        own = check_each(each, len(prompts))
        loaded = self._open()
        answers = [
            loaded.prepare(prompt, {**options, **changes})
            for prompt, changes in zip(prompts, own, strict=True)
        ]
        if any(answer.speculate for answer in answers):
            raise UsageError("a batch cannot speculate", "Leave it out, or use generate")
        if not answers or not self._turn.acquire(self._closing.is_set, _waits(options)):
            return [answer.reply() for answer in answers]
        try:
            room = max(len(answer.prompt_ids) + answer.limit for answer in answers)
            sequences = min(max_batch, len(answers))
            engine = make_engine(
                loaded.backbone, loaded.stack, room, sequences, beside=loaded.engine
            )
            run_batch(engine, answers, self._closing)
        finally:
            self._turn.release()
        return [answer.reply() for answer in answers]

    @memory_for(ANSWERING)
    def score(
        self,
        prompt: str | Sequence[Message],
        continuations: Sequence[str],
        ends: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Likelihood]:
        """How likely each of the texts is as the answer to a prompt: its tokens are given, not
        sampled. The prompt is prefilled once, under one fusion: the one pinned by `adapters=`,
        or what the router picks for the prompt. Options about sampling change nothing.

        Args:
            ends: whether the probability that the answer ends behind the text belongs to it;
                without it a text that another one begins with is never less likely than that.

        Raises:
            UsageError, ContextLengthError: as `generate`, or a continuation is empty.
        """
        loaded = self._open()
        if not self._turn.acquire(self._closing.is_set, _waits(options)):
            raise _closed()
        try:
            return loaded.score(prompt, continuations, ends, options)
        finally:
            self._turn.release()

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has for the backbone, without the chat template."""
        return self._open().count_tokens(text)

    @memory_for(ANSWERING)
    def route(
        self, prompt: str, generated: str = "", **options: Unpack[RouteOptions]
    ) -> RouteDecision:
        """What the router decides for a prompt, or for a sentence that begins after `generated`.

        Raises:
            UsageError: the prompt is empty, the bundle has no router, or an option is wrong.
        """
        check_option_names(options)
        check_prompt(prompt)
        loaded = self._open()
        return route_with(loaded.router, loaded.manifest, **options).decide(prompt, generated)

    def add_adapter(self, name: str, peft_dir: str | Path, examples: Examples = ()) -> AdapterInfo:
        """Adds a PEFT adapter to the bundle, here and on the disk; see `add_skill`.

        Waits for the request under way. Requests that have begun keep the adapters they had.

        Args:
            examples: 10 to 100 prompts, or {"prompt", "response"?, "choices"?}, that teach the
                router; without any the adapter can be pinned but is never routed to.

        Raises:
            AdapterError, UsageError, RouterError, BundleError, ResourceError: see `add_skill`;
                nothing has changed. UsageError also with a `trusted_key`.
        """
        self._change(lambda router: add_skill(self._bundle, router, name, peft_dir, examples))
        return self.adapters[-1]

    def remove_adapter(self, name: str) -> None:
        """Takes an adapter out of the bundle, here and on the disk; its text goes to the base
        model from then on.

        Raises:
            UsageError: the bundle has no such adapter, or there is a `trusted_key`.
            BundleError, ResourceError: the bundle cannot be written; nothing has changed.
        """
        self._change(lambda router: remove_skill(self._bundle, router, name))

    @memory_for(CHANGING)
    def _change(self, write: Callable[[Router | None], Bundle]) -> None:
        """Writes a new edition of the bundle and takes it over, in one step."""
        if self._trusted is not None:
            raise UsageError(
                "this Runtime takes signed bundles only, and a change would end the signature",
                "Change a copy of the bundle without a trusted key, and sign it",
            )
        self._turn.acquire(lambda: False)
        try:
            loaded = self._open()
            bundle = write(loaded.router)
            self._loaded = loaded.with_edition(bundle)
            self._bundle = bundle
        finally:
            self._turn.release()

    def close(self) -> None:
        """Ends all streams and gives the memory back; a request afterwards is a UsageError.

        In a process that was forked off it does nothing: the threads that it would wait for are
        not there.
        """
        if self._process != os.getpid():
            return
        self._closing.set()
        self._end_streams()
        self._turn.acquire(self._end_streams)
        self._loaded = None
        self._turn.release()
        release_memory()

    def _end_streams(self) -> bool:
        """Closes all streams; False, since closing the Runtime is never given up."""
        with self._streams_lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        return False

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a Runtime cannot be sent to another process",
            "Send the bundle's path and load it there",
        )

    def _open(self) -> Loaded:
        if self._loaded is None:
            raise _closed()
        if self._process != os.getpid():  # onnxruntime's threads do not survive a fork
            raise UsageError(
                "this Runtime was loaded before its process forked", "Load it in the new process"
            )
        return self._loaded

    def _host(self) -> Host:
        """What a session asks of this Runtime. Not kept: it refers back."""
        return Host(self._prepare_turn, self._copy_cache)

    def _prepare_turn(
        self, messages: Sequence[Message], options: GenerateOptions
    ) -> tuple[Answer, Start]:
        loaded = self._open()
        answer = loaded.prepare(messages, options)

        def start(session: Session, on_end: Callable[[Reply], None]) -> Stream:
            engine = partial(loaded.caches.engine_of, session)
            return self._watch(Stream(engine, answer, self._turn, _waits(options), on_end))

        return answer, start

    @memory_for(ANSWERING)
    def _copy_cache(self, source: Session, target: Session) -> None:
        caches = self._open().caches
        if self._turn.acquire(self._closing.is_set):
            try:
                caches.copy(source, target)
            finally:
                self._turn.release()

    def _watch(self, stream: Stream) -> Stream:
        """Remembers a stream, so that closing the Runtime ends it.

        Raises:
            UsageError: the Runtime was closed meanwhile.
        """
        with self._streams_lock:
            if self._closing.is_set():
                raise _closed()
            self._streams.add(stream)
        return stream


def _closed() -> UsageError:
    return UsageError("this Runtime is closed", "Make a new one")


def _waits(options: GenerateOptions) -> bool:
    """Whether a request waits for the one before it."""
    return options.get("wait", True)
