"""What can be typed into `dlp-edge chat`: the commands, and what they act on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dlp_edge.cli import output
from dlp_edge.cli.colours import tints_of
from dlp_edge.cli.line_input import QUOTES
from dlp_edge.cli.options import parse_adapters
from dlp_edge.errors import UsageError
from dlp_edge.types import Reply

if TYPE_CHECKING:
    from dlp_edge.runtime.runtime import Runtime
    from dlp_edge.runtime.session import Session
    from dlp_edge.runtime.stream import Stream


@dataclass
class Chat:
    """A conversation as it stands.

    Attributes:
        options: for `Session.stream`; the commands change its `adapters`.
        last: the last answer.
        out: where the commands print to.
    """

    runtime: Runtime
    session: Session
    options: dict[str, Any]
    out: TextIO
    last: Reply | None = None
    ended: bool = False

    @property
    def names(self) -> list[str]:
        """The bundle's adapters."""
        return [adapter.name for adapter in self.runtime.adapters]

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)


@dataclass(frozen=True)
class Command:
    """A command: how it is written, what it does, and the function that does it; the stream that
    it returns is an answer to be shown."""

    usage: str
    help: str
    run: Callable[[Chat, str], Stream | None]


def run_line(chat: Chat, line: str) -> Stream | None:
    """Does what a line says: a command, or something to be answered.

    Raises:
        UsageError: no such command, or not in this way.
    """
    if not line.startswith("/") or line.startswith("//") or "\n" in line:
        return chat.session.stream(_as_text(line), **chat.options)
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        raise UsageError(f"there is no command /{name}", "/help lists them; // begins a text")
    command, rest = COMMANDS[name], rest.strip()
    if bool(rest) != (" " in command.usage):
        raise UsageError(f"/{name} is not written so", f"Write {command.usage}")
    return command.run(chat, rest)


def _as_text(line: str) -> str:
    """A message as it is meant: two slashes stand for one."""
    return line[1:] if line.startswith("//") else line


def legend(chat: Chat, stream: TextIO) -> str:
    """The adapters, each in the colour of its sentences."""
    tints = tints_of(chat.names)
    shown = [output.paint(name, tint, stream) for name, tint in tints.items()]
    return "  ".join([*shown, output.paint("base", "grey", stream)])


def _help(chat: Chat, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.say(f"{command.usage:<{width}}  {command.help}")
    chat.say(f"{QUOTES + ' ... ' + QUOTES:<{width}}  a message of several lines")


def _adapters(chat: Chat, _: str) -> None:
    pinned = chat.options.get("adapters")
    tints = tints_of(chat.names)
    for adapter in chat.runtime.adapters:
        weight = "" if not pinned or adapter.name not in pinned else f"  {pinned[adapter.name]:g}"
        unknown = "" if adapter.routed else "  (pinned only: the router does not know it)"
        label = output.paint(f"{adapter.name:<16}", tints[adapter.name], chat.out)
        chat.say(f"{label} rank {adapter.rank}{unknown}{weight}")
    chat.say(_routing_line(chat))


def _routing_line(chat: Chat) -> str:
    pinned = chat.options.get("adapters")
    return "routed" if pinned is None else f"pinned: {output.fusion_label(pinned)}"


def _pin(chat: Chat, rest: str) -> None:
    from dlp_edge.runtime.options import parse_weights

    weights = {} if rest == "base" else parse_adapters(rest)
    chat.options["adapters"] = parse_weights(weights, chat.names)
    chat.say(_routing_line(chat))


def _route(chat: Chat, _: str) -> None:
    if not any(adapter.routed for adapter in chat.runtime.adapters):
        raise UsageError("the bundle has no router", "Pin adapters with /pin")
    chat.options.pop("adapters", None)
    chat.say(_routing_line(chat))


def _reset(chat: Chat, _: str) -> None:
    system = [message for message in chat.session.messages[:1] if message["role"] == "system"]
    chat.session = chat.runtime.session(messages=system, overflow="drop_oldest")
    chat.last = None
    chat.say("forgotten")


def _undo(chat: Chat, _: str) -> None:
    asked = chat.session.undo()[0]
    chat.say(f"forgotten: {asked['content']}")


def _again(chat: Chat, _: str) -> Stream:
    return chat.session.regenerate(**chat.options)


def _save(chat: Chat, rest: str) -> None:
    chat.session.save(Path(rest).expanduser())
    chat.say(f"saved: {rest}")


def _load(chat: Chat, rest: str) -> None:
    session = chat.runtime.load_session(Path(rest).expanduser())
    session.overflow = "drop_oldest"
    chat.session, chat.last = session, None
    chat.say(f"loaded: {len(session.messages)} messages")


def _stats(chat: Chat, _: str) -> None:
    chat.say(f"{len(chat.session.messages)} messages, {chat.session.dropped} dropped")
    chat.say(_routing_line(chat))
    if chat.last is not None:
        chat.say(output.speed_of(chat.last))


def _quit(chat: Chat, _: str) -> None:
    chat.ended = True


COMMANDS = {
    command.usage[1:].partition(" ")[0]: command
    for command in (
        Command("/help", "this list", _help),
        Command("/adapters", "the bundle's adapters", _adapters),
        Command("/pin NAME[=W],...", "answer with these adapters (base: with none)", _pin),
        Command("/route", "let the router pick again", _route),
        Command("/again", "answer the last message again", _again),
        Command("/undo", "forget the last message and its answer", _undo),
        Command("/reset", "forget all but the system message", _reset),
        Command("/save FILE", "write the conversation to a file", _save),
        Command("/load FILE", "go on with one", _load),
        Command("/stats", "token counts and speed", _stats),
        Command("/quit", "end the chat, as ctrl-D does", _quit),
    )
}
