"""`Runtime`: a loaded bundle that answers prompts; it alone knows the order of the other parts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.edition import read_current
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.bundle.signing import TrustedKey
from dlp_edge.checks import check_number, check_positive
from dlp_edge.errors import UsageError
from dlp_edge.runtime.adapters.edit import Examples, add_skill, remove_skill
from dlp_edge.runtime.batching.job import Job
from dlp_edge.runtime.engine.ort_errors import ANSWERING, CHANGING, LOADING, let_go, memory_for
from dlp_edge.runtime.lifetime import Lifetime
from dlp_edge.runtime.loaded_bundle import LoadedBundle, Progress, adapter_infos, load_on
from dlp_edge.runtime.memory import CacheBudgets, estimate, release_memory, trim
from dlp_edge.runtime.options import GenerateOptions, RouteOptions, check_callable
from dlp_edge.runtime.request import parse_batch, parse_options
from dlp_edge.runtime.routing.policy import routed
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.session import Session, load_session
from dlp_edge.runtime.session_backend import SessionBackend
from dlp_edge.runtime.stream import AsyncStream, Stream
from dlp_edge.runtime.text.prompt import check_messages, check_prompt
from dlp_edge.runtime.text.tokenizer import TextTokenizer
from dlp_edge.types import (
    Activity,
    AdapterInfo,
    Estimate,
    Likelihood,
    Message,
    Overflow,
    Reply,
    Request,
    RouteDecision,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_log = logging.getLogger(__name__)


class Runtime(Lifetime):
    """A loaded bundle that answers prompts.

    Args:
        path: the bundle's folder.
        device: "cuda", "webgpu", "cpu", or "auto": the first of these that the bundle is for and
            that works here. `rt.device` says which, and `rt.device.reason` why.
        max_context: tokens of prompt and answer together, at most the backbone's own context.
        threads: CPU threads; None takes those that this process may use, 8 at most.
        on_progress: called with (stage, fraction) while loading; an exception that it raises
            stops the loading and propagates.
        cache_budget: bytes for all sessions' KV caches; beyond it the least recently used goes.
        prefix_cache: bytes for the KV caches of prefixes that requests share (on CPUs). Rounding
            then depends on what came before; 0 (default) keeps none.
        max_parallel: the most answers that are generated side by side; others wait. Fewer where
            their KV caches would take more than half of the free memory.
        trusted_key: an Ed25519 public key (a PEM file, its content, or the raw 32 bytes) that the
            bundle must be signed with; None takes any bundle. Needs the extra `sign`.

    Raises:
        BundleError: the bundle is missing, damaged, of another version, or not signed with the
            trusted key.
        DeviceError: the device is missing, or does not work.
        ResourceError: not enough memory.

    Thread-safe: requests of several threads are answered side by side.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "auto",
        max_context: int = 4096,
        threads: int | None = None,
        on_progress: Progress | None = None,
        cache_budget: int | None = None,
        max_parallel: int = 16,
        prefix_cache: int = 0,
        trusted_key: str | os.PathLike[str] | bytes | None = None,
    ) -> None:
        started = perf_counter()
        check_callable("on_progress", on_progress)
        report = on_progress or (lambda stage, fraction: None)
        check_number("prefix_cache", prefix_cache, whole=True)
        numbers = {"max_context": max_context, "threads": threads, "cache_budget": cache_budget}
        numbers["max_parallel"] = max_parallel
        for name, value in numbers.items():
            if value is not None:
                check_positive(name, value)
        super().__init__(max_parallel)
        self._trusted = None if trusted_key is None else TrustedKey(trusted_key)
        try:
            with memory_for(LOADING):
                report("manifest", 0.0)

                def read(bundle: Bundle) -> LoadedBundle:
                    self._bundle = bundle
                    budgets = CacheBudgets(cache_budget, prefix_cache)
                    return load_on(device, bundle, threads, max_context, budgets, report)

                self._loaded = read_current(path, read, self._trusted)
                self.device = self._loaded.backbone.device
                trim()  # frees the weights as read: onnxruntime has packed copies
                report("ready", 1.0)
                seconds, names = perf_counter() - started, [one.name for one in self.adapters]
                _log.info("loaded %s on %s in %.2f s: %s", path, self.device.kind, seconds, names)
        except BaseException as error:
            self._loaded = None
            let_go(error)
            release_memory()
            raise

    @classmethod
    def from_hub(cls, source: str, revision: str | None = None, **options: Any) -> Self:
        """Loads a bundle of the Hugging Face hub (`user/bundle`; extra `hub`) or of a web server
        (the URL of its folder), fetched into the user's cache and checked.

        Args:
            revision: a branch, tag or commit of the hub's repository.
            options: those of `Runtime`; `on_progress` is told of the download, too.

        Raises:
            UsageError, BundleError, ResourceError: see `dlp_edge.hub.fetch`, and `Runtime`.
        """
        from dlp_edge.hub.fetch import cached_bundle  # who has a bundle needs no HTTP

        check_callable("on_progress", options.get("on_progress"))
        tell = options.get("on_progress") or (lambda stage, fraction: None)
        return cls(cached_bundle(source, revision, tell), **options)

    @staticmethod
    def estimate(path: str | Path, max_context: int = 4096) -> Estimate:
        """The bytes that loading a bundle takes, by part, before it is loaded.

        Raises:
            BundleError: not a bundle.
        """
        return estimate(path, max_context)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The bundle's adapters, in the manifest's order."""
        return adapter_infos(self.manifest)

    @property
    def activity(self) -> Activity:
        """How many requests are answered now, how many wait, and what is kept for others."""
        prefixes = self._open().engine.prefixes
        return self._scheduler.activity(prefixes.bytes if prefixes is not None else 0)

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
        """Like `generate`: an iterator of `Chunk` with `.cancel()` and, at its end, `.reply`."""
        loaded = self._open()
        parsed = parse_options(options, loaded.manifest)
        job = Job(loaded.prepare_stream(prompt, parsed), loaded, lambda: loaded.engine)
        return self._streams.add(Stream(job, self._scheduler, parsed.wait))

    def astream(
        self, prompt: str | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """`stream` for asyncio, on a thread of its own; cancelling the task cancels it."""
        return AsyncStream(self.stream(prompt, **options))

    def session(
        self,
        system: str | None = None,
        messages: Sequence[Message] = (),
        overflow: Overflow = "error",
    ) -> Session:
        """A conversation that keeps its history and its KV cache.

        Args:
            system: the system message.
            messages: the conversation so far.
            overflow: see `Session`.

        Raises:
            UsageError: a message is malformed, or the overflow policy unknown.
        """
        start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._open()
        messages = [*check_messages(start), *check_messages(messages)]
        return Session(self._session_backend(), messages, overflow)

    def load_session(self, path: str | Path) -> Session:
        """The conversation that `Session.save` wrote; see `session`."""
        self._open()
        return load_session(self._session_backend(), path)

    @memory_for(ANSWERING)
    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Message]],
        each: Sequence[GenerateOptions] | None = None,
        max_batch: int = 8,
        **options: Unpack[GenerateOptions],
    ) -> list[Reply]:
        """Answers several prompts in one batch, each with its own routing and fusion (the batched
        GEMM of eq. 6). Greedy answers equal those of `generate`, up to rounding.

        Args:
            each: options per prompt; they override the common ones.
            max_batch: the largest batch; each sequence takes a KV cache of its own.

        Raises:
            UsageError, ContextLengthError: as `generate`, before anything is generated.
        """
        check_positive("max_batch", max_batch)
        loaded = self._open()
        parsed = parse_batch(prompts, each, options, loaded.manifest)
        answers = [loaded.prepare(prompt, own) for prompt, own in zip(prompts, parsed, strict=True)]
        wait = all(own.wait for own in parsed)
        if answers and self._scheduler.acquire(self._closing.is_set, wait):
            try:
                loaded.run_batch(answers, max_batch, self._closing)
            finally:
                self._scheduler.release()
        return [answer.reply() for answer in answers]

    @memory_for(ANSWERING)
    def score(
        self,
        prompt: str | Sequence[Message],
        continuations: Sequence[str],
        ends: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Likelihood]:
        """The log probability of each text as the answer to a prompt (teacher forcing). The prompt
        is prefilled once, under one fusion: the one pinned by `adapters=`, or the router's for the
        prompt. Sampling options have no effect.

        Args:
            ends: whether to include the probability that the answer ends after the text. Without
                it a prefix of another text is never less likely than that text.

        Raises:
            UsageError, ContextLengthError: as `generate`, or a continuation is empty.
        """
        loaded = self._open()
        parsed = parse_options(options, loaded.manifest)
        with self._alone(parsed.wait):
            return loaded.score(prompt, continuations, ends, parsed)

    def count_tokens(self, text: str) -> int:
        """The number of the backbone's tokens in a text, without the chat template.

        Raises:
            UsageError: it is not a text.
        """
        return len(self.tokenizer.encode(text))

    @property
    def tokenizer(self) -> TextTokenizer:
        """Encodes and decodes texts, and tells what a prompt costs and how much room it leaves."""
        return self._open().tokenizer

    @memory_for(ANSWERING)
    def route(
        self, prompt: str, generated: str = "", **options: Unpack[RouteOptions]
    ) -> RouteDecision:
        """The router's decision for a prompt, or for a sentence that starts after `generated`.

        Raises:
            UsageError: the prompt is empty, the bundle has no router, or an option is wrong.
        """
        check_prompt(prompt)
        loaded = self._open()
        routing = parse_options(options, loaded.manifest).routing
        return routed(routing, loaded.router, loaded.manifest).decide(prompt, generated)

    @memory_for(ANSWERING)
    def requests(self, prompt: str, **options: Unpack[RouteOptions]) -> tuple[Request, ...]:
        """The requests that a prompt holds, each with the router's decision for it; the whole
        prompt if it is one, or the bundle has no request splitter.

        Raises:
            UsageError: the prompt is empty, the bundle has no router, or an option is wrong.
        """
        check_prompt(prompt)
        loaded = self._open()
        return loaded.requests(prompt, parse_options(options, loaded.manifest))

    def add_adapter(self, name: str, peft_dir: str | Path, examples: Examples = ()) -> AdapterInfo:
        """Adds a PEFT adapter to the bundle, in memory and on disk; see `add_skill`.

        Waits for the running request. Prepared requests keep the adapters they had.

        Args:
            examples: 10 to 100 prompts, or {"prompt", "response"?, "choices"?}, to fit the
                router's row for it; without any the adapter can be pinned but is never routed to.

        Raises:
            AdapterError, UsageError, RouterError, BundleError, ResourceError: see `add_skill`;
                nothing has changed. UsageError also with a `trusted_key`.
        """
        self._change(lambda router: add_skill(self._bundle, router, name, peft_dir, examples))
        return self.adapters[-1]

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter, in memory and on disk; its text is out-of-scope from then on.

        Raises:
            UsageError: the bundle has no such adapter, or there is a `trusted_key`.
            BundleError, ResourceError: the bundle cannot be written; nothing has changed.
        """
        self._change(lambda router: remove_skill(self._bundle, router, name))

    @memory_for(CHANGING)
    def _change(self, write: Callable[[Router | None], Bundle]) -> None:
        """Writes a new edition of the bundle and switches to it, in one step."""
        if self._trusted is not None:
            raise UsageError(
                "this Runtime takes signed bundles only, and a change would end the signature",
                "Change a copy of the bundle without a trusted key, and sign it",
            )
        with self._alone():
            loaded = self._open()
            bundle = write(loaded.router)
            self._loaded = loaded.with_edition(bundle)
            self._bundle = bundle

    def _session_backend(self) -> SessionBackend:
        return SessionBackend(self._open, self._scheduler, self._streams, self._closing)
