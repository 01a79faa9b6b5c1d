"""`Runtime`: a bundle, loaded; the only part that knows the order of the others."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dlp_edge import bundle as files
from dlp_edge.bundle import open_bundle
from dlp_edge.errors import BusyError, ContextLengthError, UsageError
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
from dlp_edge.runtime.steering import Pinned, Steering, load_router, route_with
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
        self.manifest = manifest
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
        tell("ready", 1.0)

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
        self._streams.add(stream)
        return stream

    def route(
        self, prompt: str, generated: str = "", **options: Unpack[RouteOptions]
    ) -> RouteDecision:
        """What the router decides for a prompt, or for a sentence that begins after `generated`.

        Raises:
            UsageError: the bundle has no router, or an option is wrong.
        """
        check_option_names(options)
        if not prompt.strip():
            raise UsageError("the prompt is empty", "Give it some text")
        self._loaded()
        return route_with(self._router, self.manifest, **options).decide(prompt, generated)

    def close(self) -> None:
        """Ends all streams and gives the memory back; a request afterwards is a UsageError."""
        for stream in list(self._streams):
            stream.close()
        with self._turn:
            self._engine = None

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
        if pinned is not None:
            return Pinned(parse_weights(pinned, names))
        if not names:
            return Pinned({})
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
    with turn:
        yield from generation.run()


class _Turn:
    """Lets one request at a time use the engine. A lock that names the deadlock of a thread that
    starts a request inside its own unfinished stream."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise BusyError(
                "this thread has an unfinished stream on the same Runtime",
                "Exhaust or cancel it first",
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    messages: list[Message] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    )
    for message in messages:
        if not {"role", "content"} <= set(message):
            raise UsageError("a message has no role or no content", "Give it both")
    if not messages or not _user_text(messages).strip():
        raise UsageError("the prompt is empty", "Give it some text")
    return messages


def _user_text(messages: Sequence[Message]) -> str:
    """What the router reads: the last thing that the user said."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[-1] if said else ""
