"""What the user types or pastes into a chat, as messages of one line or several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

QUOTES = '"""'  # begin and end a message of several lines
FIRST, FURTHER = "> ", ". "  # what asks for a line

ReadLine = Callable[[str], str | None]
"""Shows a prompt and returns a line; None at the end of the input."""


def read_messages(read: ReadLine) -> Iterator[str]:
    """The messages, without blank ones; a pasted text is a line that holds line breaks.

    A KeyboardInterrupt gives up the message that is being typed and propagates.
    """
    while (line := read(FIRST)) is not None:
        text = line.strip()
        if text.startswith(QUOTES):
            text = _read_block(text.removeprefix(QUOTES), read)
        if text:
            yield text


def _read_block(begun: str, read: ReadLine) -> str:
    """The text up to the closing quotes, or to the end of the input."""
    lines = [begun]
    while not lines[-1].rstrip().endswith(QUOTES):
        line = read(FURTHER)
        if line is None:
            break
        lines.append(line)
    return "\n".join(lines).strip().removesuffix(QUOTES).strip()


def terminal_reader() -> ReadLine:
    """Reads from the terminal, a paste of several lines as one."""
    pastes_whole = _edit_lines()

    def read(prompt: str) -> str | None:
        try:
            lines = [input(prompt)]
            while not pastes_whole and _more_is_waiting():
                lines.append(input())
        except EOFError:
            print()
            return None
        return "\n".join(lines)

    return read


def _edit_lines() -> bool:
    """Loads a line editor, where Python has one; whether it takes a paste as a whole."""
    try:
        import readline  # gives input() a line editor; Windows has its own
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return True


def _more_is_waiting() -> bool:
    """Whether the next line has arrived already: nobody types that fast."""
    if sys.platform == "win32":
        import msvcrt

        return msvcrt.kbhit()
    import select

    return bool(select.select([sys.stdin], [], [], 0.02)[0])
