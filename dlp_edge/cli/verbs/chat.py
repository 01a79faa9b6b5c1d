"""`dlp-edge chat BUNDLE`: a conversation on the terminal, or with lines from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from typing import TYPE_CHECKING, Any

from dlp_edge.cli import options, output
from dlp_edge.cli.chat_commands import Chat, legend, run_line
from dlp_edge.cli.line_input import read_messages, terminal_reader
from dlp_edge.errors import DlpEdgeError
from dlp_edge.types import Chunk

if TYPE_CHECKING:
    from dlp_edge.runtime.stream import Stream


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="chat on the terminal",
        description="A conversation; /help lists its commands. Ctrl-C stops an answer, "
        'ctrl-D ends the chat. A pasted text is one message, and so is what stands between """ '
        'and """. Lines from a pipe are answered one after the other.',
    )
    options.add_bundle(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    options.add_generation(parser)
    options.add_routing(parser)
    options.add_engine(parser)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dlp_edge.cli.loading import open_runtime

    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not arguments.json
    request = options.request_options(arguments)
    turns: list[dict[str, Any]] = []
    with open_runtime(arguments) as runtime:
        session = runtime.session(arguments.system, overflow="drop_oldest")
        chat = Chat(runtime, session, request, sys.stderr if arguments.json else sys.stdout)
        if interactive and not arguments.quiet:
            output.note(f"{legend(chat, sys.stderr)}\n/help lists the commands")
        for line in _messages(interactive):
            with _kept_going() if interactive else contextlib.nullcontext():
                stream = run_line(chat, line)
                if stream is not None:
                    _answer(chat, stream, interactive, arguments)
                    turns.append({"prompt": line, **output.reply_document(stream.reply)})
            if chat.ended:
                break
        if arguments.json:
            output.print_json({"turns": turns, "dropped": chat.session.dropped})
    return 0


def _messages(interactive: bool) -> Iterator[str]:
    """What the user types, or the lines of a pipe, until the end of the input."""
    if not interactive:
        yield from read_messages(lambda _: _piped_line())
        return
    read = terminal_reader()
    while True:
        try:
            yield from read_messages(read)
            return
        except KeyboardInterrupt:
            output.note("\nctrl-D or /quit ends the chat")


def _piped_line() -> str | None:
    line = sys.stdin.readline()
    if not line:
        return None
    return line.rstrip("\r\n").removeprefix("\ufeff")  # PowerShell writes a byte order mark


@contextlib.contextmanager
def _kept_going() -> Iterator[None]:
    """Tells an error and lets the chat go on."""
    try:
        yield
    except DlpEdgeError as error:
        output.print_error(error)
    except KeyboardInterrupt:
        output.note("\nstopped")


def _answer(chat: Chat, stream: Stream, interactive: bool, arguments: argparse.Namespace) -> None:
    dropped = chat.session.dropped
    with stream, _stopped_by_interrupt(stream) if interactive else contextlib.nullcontext():
        chunks = _on_a_thread(stream)
        if arguments.json:
            for _ in chunks:
                pass
        else:
            output.print_sentences(chunks, chat.names)
    chat.last = stream.reply
    dropped = chat.session.dropped - dropped
    if stream.reply.finish_reason == "cancelled":
        output.note(output.paint("stopped", "grey", sys.stderr))
    if dropped and not arguments.quiet:
        output.note(f"the context is full: the oldest {dropped} messages were forgotten")


@contextlib.contextmanager
def _stopped_by_interrupt(stream: Stream) -> Iterator[None]:
    """Ctrl-C ends the answer, which then becomes part of the conversation as far as it came."""
    before = signal.signal(signal.SIGINT, lambda *_: stream.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _on_a_thread(stream: Stream) -> Iterator[Chunk]:
    """The chunks, made on another thread: Python handles ctrl-C on this one only, and not before
    a pass through the backbone comes back."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            while (chunk := _result(thread.submit(next, stream, None))) is not None:
                yield chunk
        except BaseException:  # leaving the block waits for the thread
            stream.cancel()
            raise


def _result(future: Future[Chunk | None]) -> Chunk | None:
    while True:
        with contextlib.suppress(StillRunning):
            return future.result(timeout=0.1)  # without one, Windows does not see ctrl-C
