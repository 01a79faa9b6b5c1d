"""A conversation: its messages and its KV cache."""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dlp_edge.atomic.staging import replace_file
from dlp_edge.checks import check_number
from dlp_edge.errors import BusyError, ContextLengthError, ResourceError, UsageError
from dlp_edge.runtime.options import GenerateOptions
from dlp_edge.runtime.request import RequestOptions
from dlp_edge.runtime.session_backend import SessionBackend, StreamFactory
from dlp_edge.runtime.stream import AsyncStream, Stream
from dlp_edge.runtime.text.prompt import check_messages
from dlp_edge.types import Message, Overflow, Reply
from dlp_edge.untrusted.regular_file import read_followed

if TYPE_CHECKING:
    from typing_extensions import Unpack

FORMAT = "dlp-edge-session"
VERSION = 1
MAX_SESSION_BYTES = 64 << 20
MAX_DROPPED = 1 << 40


Change = Callable[[list[Message]], list[Message]]
# Reserve ANSWER_PART of the context for the answer. When turns must go, drop to KEPT_PART, since
# each drop invalidates the cache.
ANSWER_PART = 1 / 4
KEPT_PART = 1 / 2


class Session:
    """A chat with a `Runtime`; made by `Runtime.session`.

    A turn prefills only what the KV cache does not hold under the same fusion: the new messages.
    Under another fusion the whole conversation is prefilled again, since the cache depends on the
    adapters that wrote it.

    Attributes:
        overflow: "error" refuses a turn that does not fit; "drop_oldest" drops the oldest turns
            (never the system message) until prompt and answer fit.
        dropped: the number of messages dropped.

    One turn at a time: a second one raises BusyError while the first is unfinished.
    """

    def __init__(
        self,
        backend: SessionBackend,
        messages: Sequence[Message],
        overflow: Overflow,
        dropped: int = 0,
    ) -> None:
        if overflow not in get_args(Overflow):
            raise UsageError(
                f"unknown overflow policy {overflow!r}", f"Use {' or '.join(get_args(Overflow))}"
            )
        self.overflow = overflow
        self.dropped = dropped
        self._backend = backend
        self._messages = list(messages)
        self._starting = threading.Lock()
        # Weak: an abandoned stream must be freed, and so end.
        self._running: Callable[[], Stream | None] = lambda: None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        return tuple(self._messages)

    def send(self, text: str, **options: Unpack[GenerateOptions]) -> Reply:
        """Adds a user message and returns the answer; see `stream`."""
        return self.stream(text, **options).finish()

    def stream(self, text: str, **options: Unpack[GenerateOptions]) -> Stream:
        """Adds a user message and streams the answer. Both join the conversation when the stream
        ends; a cancelled answer with the text that it has.

        Raises:
            BusyError: the previous turn is unfinished.
            UsageError: an option is wrong, or the text is empty.
            ContextLengthError: the conversation does not fit; see `overflow`.
        """
        return self._turn(lambda said: [*said, {"role": "user", "content": text}], options)

    def astream(self, text: str, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """`stream` for asyncio."""
        return AsyncStream(self.stream(text, **options))

    def regenerate(self, **options: Unpack[GenerateOptions]) -> Stream:
        """Answers the last user message again; the new answer replaces the old."""
        return self._turn(lambda said: said[: _user_turns(said)[-1] + 1], options)

    def edit(self, turn: int, text: str, **options: Unpack[GenerateOptions]) -> Stream:
        """Replaces the user message of a turn (from 0, dropped turns not counted; -1 is the last),
        drops all later messages, and answers it."""

        def change(said: list[Message]) -> list[Message]:
            turns = _user_turns(said)
            check_number("turn", turn, whole=True)
            if not -len(turns) <= turn < len(turns):
                raise UsageError(f"there is no turn {turn}", f"The conversation has {len(turns)}")
            return [*said[: turns[turn]], {"role": "user", "content": text}]

        return self._turn(change, options)

    def resume(self, results: Sequence[str], **options: Unpack[GenerateOptions]) -> Stream:
        """Answers again, after the results of the last answer's tool calls.

        Args:
            results: one for each call, in their order.

        Raises:
            UsageError: there are no calls, or not as many; else as `stream`.
        """

        def change(said: list[Message]) -> list[Message]:
            calls = said[-1].get("tool_calls", ()) if said else ()
            if not calls or isinstance(results, str) or len(results) != len(calls):
                raise UsageError(
                    f"the last answer made {len(calls)} tool calls", "Give a list of their results"
                )
            return said + [
                {"role": "tool", "content": result, "tool_call_id": call["id"]}
                for result, call in zip(results, calls, strict=True)
            ]

        return self._turn(change, options)

    def undo(self) -> tuple[Message, ...]:
        """Forgets the last user message and all after it; returns what was forgotten.

        Raises:
            UsageError: there is no user message.
            BusyError: an answer is unfinished.
        """
        with self._idle():
            last = _user_turns(self._messages)[-1]
            forgotten = tuple(self._messages[last:])
            self._messages = self._messages[:last]
        return forgotten

    def insert(self, message: Message, at: int | None = None) -> None:
        """Adds a message without answering it, such as an answer that the application gave.

        Args:
            at: its index in `messages`, as for a list; None is the end.

        Raises:
            UsageError: it is no message, or the index is no whole number.
            BusyError: an answer is unfinished.
        """
        [checked] = check_messages([message])
        if at is not None:
            check_number("at", at, whole=True)
        with self._idle():
            messages = list(self._messages)
            messages.insert(len(messages) if at is None else at, checked)
            self._messages = messages

    def branch(self) -> Session:
        """A copy of the conversation, KV cache included, that continues on its own."""
        twin = Session(self._backend, self._messages, self.overflow, self.dropped)
        self._backend.copy_cache(self, twin)
        return twin

    def save(self, path: str | Path, cache: bool = False) -> None:
        """Writes the conversation as JSON, atomically and readable by its owner only.

        Args:
            cache: whether to write the KV cache, too, into a file beside it (`.kv`, tens of KB a
                token). Without it the first turn after loading prefills the conversation again.

        Raises:
            ResourceError: the file cannot be written.
        """
        content = {
            "format": FORMAT,
            "version": VERSION,
            "overflow": self.overflow,
            "dropped": self.dropped,
            "messages": self._messages,
        }
        path = Path(path)
        held = self._backend.cache_of(self) if cache else None
        try:
            if held is None:  # the cache first: without its conversation it is not used
                _cache_file(path).unlink(missing_ok=True)
            else:
                replace_file(_cache_file(path), held)
            replace_file(path, json.dumps(content, ensure_ascii=False, indent=1).encode())
        except OSError as error:
            raise ResourceError(
                f"{path} cannot be written ({error.strerror})", "Choose another place"
            ) from error

    @contextlib.contextmanager
    def _idle(self) -> Iterator[None]:
        """Keeps other turns out; raises BusyError while one is unfinished."""
        with self._starting:
            running = self._running()
            if running is not None and not running.ended:
                raise BusyError(
                    "the session's last answer is unfinished",
                    "Exhaust or close its stream first",
                )
            yield

    def _turn(self, change: Change, options: GenerateOptions) -> Stream:
        with self._idle():
            parsed = self._backend.parse_options(options)
            messages, start, dropped = self._fit(change(self._messages), parsed)

            def remember(reply: Reply) -> None:
                if reply.usage.completion_tokens:
                    said: dict[str, Any] = {"role": "assistant", "content": reply.text}
                    if reply.tool_calls:
                        said["tool_calls"] = [call.message for call in reply.tool_calls]
                    self._messages = [*messages, said]
                    self.dropped += dropped

            stream = start(self, remember)
            self._running = weakref.ref(stream)
            return stream

    def _fit(
        self, messages: list[Message], options: RequestOptions
    ) -> tuple[list[Message], StreamFactory, int]:
        """The messages that fit, what starts their answer, and how many were dropped."""
        wanted = options.decoding.max_new_tokens
        dropped = 0
        while True:
            rest = _without_oldest_turn(messages) if self.overflow == "drop_oldest" else None
            try:
                answer, start = self._backend.prepare_turn(messages, options)
            except ContextLengthError:
                if rest is None:
                    raise
            else:
                if dropped:
                    fits = len(answer.prompt_ids) <= answer.room * KEPT_PART
                else:
                    fits = answer.limit >= min(wanted, answer.room * ANSWER_PART)
                if fits or rest is None:
                    return messages, start, dropped
            dropped += len(messages) - len(rest)
            messages = rest


def _user_turns(messages: Sequence[Message]) -> list[int]:
    """The indices of the user's messages.

    Raises:
        UsageError: there are none.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not turns:
        raise UsageError("the conversation is empty", "Say something first")
    return turns


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """The conversation without its first user message and answer; None if that is all."""
    turns = _user_turns(messages)
    return messages[: turns[0]] + messages[turns[1] :] if len(turns) > 1 else None


def load_session(backend: SessionBackend, path: str | Path) -> Session:
    """The session that `Session.save` wrote.

    Raises:
        UsageError: the file cannot be read, or is no saved session.
    """
    try:
        content = json.loads(read_followed(Path(path), MAX_SESSION_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error})", "Give a saved session") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is no saved session", "Give what Session.save wrote")
    if content.get("version") != VERSION:
        raise UsageError(
            f"{path} has version {content.get('version')}, this is {VERSION}",
            "Use the version of dlp-edge that wrote it",
        )
    messages, dropped = content.get("messages"), content.get("dropped")
    overflow: Any = content.get("overflow")  # checked by Session
    if (
        not isinstance(messages, list)
        or not isinstance(dropped, int)
        or isinstance(dropped, bool)
        or not 0 <= dropped <= MAX_DROPPED
    ):
        raise UsageError(f"{path} is damaged", "Give what Session.save wrote")
    session = Session(backend, check_messages(messages), overflow, dropped)
    if _cache_file(Path(path)).exists():
        backend.restore_cache(session, _cache_file(Path(path)))
    return session


def _cache_file(path: Path) -> Path:
    """Where the cache of a saved session lies."""
    return path.with_name(f"{path.name}.kv")
