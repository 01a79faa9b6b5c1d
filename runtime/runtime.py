"""`Runtime`: a bundle, loaded; the only part that knows the order of the others."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dlp_edge import bundle as files
from dlp_edge.bundle import Bundle, open_bundle
from dlp_edge.errors import BusyError, ContextLengthError, UsageError
from dlp_edge.manifest import Manifest
from dlp_edge.runtime.decoder import Decoder
from dlp_edge.runtime.device import choose_device
from dlp_edge.runtime.fusion import Fuser, parse_weights
from dlp_edge.runtime.generation import Engine, Generation
from dlp_edge.runtime.options import (
    GenerateOptions,
    RouteOptions,
    check_option_names,
    decoding_of,
)
from dlp_edge.runtime.skills import Examples, add_skill, remove_skill
from dlp_edge.runtime.steering import (
    Pinned,
    Steering,
    check_prompt,
    check_routing,
    load_router,
    route_with,
)
from dlp_edge.runtime.text import ChatTemplate, parse_tokenizer
from dlp_edge.types import AdapterInfo, Chunk, Message, Reply, RouteDecision

if TYPE_CHECKING:
    from typing_extensions import Unpack

Progress = Callable[[str, float], None]


class Runtime:
    """A loaded bundle that answers prompts.

    Args:
        path: the bundle's folder.
        device: "auto" (what the bundle was exported for), "cpu" or "cuda".
        max_context: room for prompt and answer in tokens, at most the backbone's own context.
        threads: processor threads; None takes what this process may use, 8 at most.
        on_progress: called with (stage, fraction) while loading.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
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
    ) -> None:
        tell = on_progress or (lambda stage, fraction: None)
        if max_context < 1:
            raise UsageError(f"max_context is {max_context}", "Choose at least 1")
        tell("manifest", 0.0)
        bundle = open_bundle(path)
        manifest = bundle.manifest
        backbone = manifest.backbone
        self._bundle = bundle
        self.device = choose_device(device, manifest.target, threads)
        tell("adapters", 0.05)
        stack = bundle.adapters()
        tokenizer = parse_tokenizer(bundle.read(files.TOKENIZER), files.TOKENIZER)
        self._template = ChatTemplate(manifest.chat_template)
        tell("router", 0.15)
        self._router = load_router(bundle)
        tell("checksums", 0.2)
        bundle.verify(files.BACKBONE)
        bundle.verify(files.BACKBONE_DATA)
        tell("backbone", 0.5)
        room = min(max_context, backbone.context_length)
        decoder = Decoder(bundle.path(files.BACKBONE), backbone, self.device, room)
        fuser = Fuser(stack, backbone.slots, backbone.dtype)
        decoder.set_fusion(fuser.fuse({}))
        self._engine: Engine | None = Engine(
            decoder, fuser, tokenizer, frozenset(backbone.eos_token_ids)
        )
        self._turn = _Turn()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._streams_lock = threading.Lock()
        tell("ready", 1.0)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._bundle.manifest

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The bundle's adapters, in its order."""
        labels = self._router.labels if self._router else ()
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
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.reply

    def stream(self, prompt: str | Sequence[Message], **options: Unpack[GenerateOptions]) -> Stream:
        """Like `generate`, piece by piece: an iterator of `Chunk` with `.cancel()` and, at its
        end, `.reply`."""
        check_option_names(options)
        messages = _messages(prompt)
        engine = self._loaded()
        steering = self._steering(**options)
        backbone = self.manifest.backbone
        text = self._template.render(messages, backbone.bos_token, backbone.eos_token)
        ids = engine.tokenizer.encode(text, add_special_tokens=self._template.is_plain).ids
        if not ids:
            raise UsageError("the chat template makes an empty prompt of this", "Give it some text")
        if len(ids) >= engine.decoder.max_context:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, the context holds "
                f"{engine.decoder.max_context} with the answer",
                "Shorten the prompt, or load the bundle with a larger max_context",
            )
        cancelled = threading.Event()
        generation = Generation(
            engine=engine,
            prompt_ids=ids,
            user_text=_user_text(messages),
            decoding=decoding_of(**options),
            steering=steering,
            should_stop=cancelled.is_set,
        )
        stream = Stream(generation, cancelled, self._turn)
        with self._streams_lock:
            self._streams.add(stream)
        return stream

    def route(
        self, prompt: str, generated: str = "", **options: Unpack[RouteOptions]
    ) -> RouteDecision:
        """What the router decides for a prompt, or for a sentence that begins after `generated`.

        Raises:
            UsageError: the prompt is empty, the bundle has no router, or an option is wrong.
        """
        check_option_names(options)
        check_prompt(prompt)
        self._loaded()
        return route_with(self._router, self.manifest, **options).decide(prompt, generated)

    def add_adapter(self, name: str, peft_dir: str | Path, examples: Examples = ()) -> AdapterInfo:
        """Adds a PEFT adapter to the bundle, here and on the disk; see `add_skill`.

        Waits for the request under way. Requests that have begun keep the adapters they had.

        Args:
            examples: 10 to 100 prompts, or {"prompt", "response"?, "choices"?}, that teach the
                router; without any the adapter can be pinned but is never routed to.

        Raises:
            AdapterError, UsageError, RouterError, BundleError, ResourceError: see `add_skill`;
                nothing has changed.
        """
        self._change(lambda: add_skill(self._bundle, self._router, name, peft_dir, examples))
        return self.adapters[-1]

    def remove_adapter(self, name: str) -> None:
        """Takes an adapter out of the bundle, here and on the disk; its text goes to the base
        model from then on.

        Raises:
            UsageError: the bundle has no such adapter.
            BundleError, ResourceError: the bundle cannot be written; nothing has changed.
        """
        self._change(lambda: remove_skill(self._bundle, self._router, name))

    def _change(self, write: Callable[[], Bundle]) -> None:
        """Writes a new edition of the bundle and takes over what is new in it."""
        self._turn.acquire(lambda: False)
        try:
            engine = self._loaded()
            bundle = write()
            backbone = bundle.manifest.backbone
            fuser = Fuser(bundle.adapters(), backbone.slots, backbone.dtype)
            if self._router is not None and bundle.manifest.router is not None:
                settings = bundle.manifest.router.settings
                self._router = self._router.with_head(bundle.router_head(), settings)
            self._engine = replace(engine, fuser=fuser)
            self._bundle = bundle
        finally:
            self._turn.release()

    def close(self) -> None:
        """Ends all streams and gives the memory back; a request afterwards is a UsageError."""
        self._end_streams()
        self._turn.acquire(self._end_streams)
        self._engine = None
        self._turn.release()

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

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise UsageError("this Runtime is closed", "Make a new one")
        return self._engine

    def _steering(self, **options: Unpack[GenerateOptions]) -> Steering:
        pinned = options.get("adapters")
        names = [entry.name for entry in self.manifest.adapters]
        if pinned is not None or not names:
            check_routing(self.manifest, **options)
            return Pinned(parse_weights(pinned or {}, names))
        return route_with(self._router, self.manifest, **options)


class Stream:
    """An answer under way: iterate over its chunks; `reply` is the whole of it at any time."""

    def __init__(self, generation: Generation, cancelled: threading.Event, turn: _Turn) -> None:
        self._generation = generation
        self._cancelled = cancelled
        # Not a method: an abandoned stream must be freed at once, so nothing refers back to it.
        self._chunks = _take_turn(turn, generation)

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def cancel(self) -> None:
        """Ends the answer at the next token or prefill chunk; callable from any thread."""
        self._cancelled.set()

    def close(self) -> None:
        """Ends the answer now, or at the next token where another thread is in the middle of
        it, and lets other requests go on."""
        self.cancel()
        with contextlib.suppress(ValueError):  # "generator already executing"
            self._chunks.close()

    @property
    def reply(self) -> Reply:
        """The answer so far, with the sentences and the timings."""
        return self._generation.reply()


def _take_turn(turn: _Turn, generation: Generation) -> Generator[Chunk, None, None]:
    if not turn.acquire(generation.should_stop):
        return
    try:
        yield from generation.run()
    finally:
        turn.release()


class _Turn:
    """Lets one request at a time use the engine. A lock that can be given up while waiting, and
    that names the deadlock of a thread that starts a request inside its own unfinished stream."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def acquire(self, given_up: Callable[[], bool]) -> bool:
        """Waits for the turn, asking `given_up` now and then; False if it said so."""
        if self._owner == threading.get_ident():
            raise BusyError(
                "this thread has an unfinished stream on the same Runtime",
                "Exhaust or close it first",
            )
        while not self._lock.acquire(timeout=0.05):
            if given_up():
                return False
        self._owner = threading.get_ident()
        return True

    def release(self) -> None:
        self._owner = None
        self._lock.release()


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    """The prompt as chat messages, checked."""
    if isinstance(prompt, str):
        check_prompt(prompt)
        return [{"role": "user", "content": prompt}]
    messages: list[Message] = list(prompt) if isinstance(prompt, (list, tuple)) else []
    if not messages:
        raise UsageError(f"the prompt is {prompt!r}", "Give a text or a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UsageError(
                f"{message!r} is no message", 'Write {"role": "user", "content": "..."}'
            )
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise UsageError(f"{message!r} has a role or content that is no text", "Give texts")
    check_prompt(_user_text(messages))
    return messages


def _user_text(messages: Sequence[Message]) -> str:
    """What the router reads: the last thing that the user said."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[-1] if said else ""
