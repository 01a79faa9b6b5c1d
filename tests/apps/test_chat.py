"""`dlp-edge chat`: through a pipe, and on a terminal with a real ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlp_edge import Runtime
from dlp_edge.cli.main import main

posix = pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")


@pytest.fixture
def chat(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Chat:
    return Chat(tiny_bundle, monkeypatch, capsys)


class Chat:
    """Runs a chat on lines from a pipe."""

    def __init__(
        self, bundle: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._bundle, self._patch, self._capsys = bundle, patch, capsys

    def __call__(self, *lines: str, options: tuple[str, ...] = (), code: int = 0) -> str:
        """What it prints; with an error, that."""
        self._patch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        words = ["chat", str(self._bundle), "--max-new-tokens", "12", *options]
        assert main(words) == code
        out, err = self._capsys.readouterr()
        return err if code else out


def test_lines_from_a_pipe_are_answered_in_plain_text(chat: Chat, tiny_bundle: Path) -> None:
    out = chat("Tom has 3 apples.", "", "And then?", options=("--adapters", "sums"))
    assert "\x1b" not in out
    assert "> " not in out
    assert out.count("sums 1.00") >= 2
    turns = json.loads(chat("Tom has 3 apples.", "And then?", options=("--json",)))["turns"]
    with Runtime(tiny_bundle) as runtime:
        session = runtime.session()
        expected = [session.send(turn["prompt"], max_new_tokens=12).text for turn in turns]
    assert [turn["text"] for turn in turns] == expected
    assert turns[1]["usage"]["prompt_tokens"] > turns[0]["usage"]["prompt_tokens"]


def test_pinning_and_routing(chat: Chat) -> None:
    out = chat("/adapters", "/pin sums,sql=0.5", "Hi.", "/adapters", "/pin base", "Hi.", "/route")
    assert "email            rank 2" in out
    assert out.index("routed") < out.index("pinned: sums 1.00 + sql 0.50")
    assert "sums 1.00 + sql 0.50    │" in out
    assert "base                    │" in out
    assert out.rstrip().endswith("routed")


def test_undo_again_and_reset(chat: Chat) -> None:
    def prompts(*lines: str) -> list[int]:
        turns = json.loads(chat(*lines, options=("--json", "--adapters", "sums")))["turns"]
        return [turn["usage"]["prompt_tokens"] for turn in turns]

    one, two = prompts("One.", "Two, here.")
    assert prompts("One.", "Two, here.", "/undo", "Two, here.") == [one, two, two]
    assert prompts("One.", "Two, here.", "/again") == [one, two, two]
    assert prompts("One.", "Two, here.", "/reset", "One.") == [one, two, one]
    assert prompts("One.", "/undo", "One.") == [one, one]
    system = ("--json", "--adapters", "sums", "--system", "Be brief.")
    kept = json.loads(chat("One.", "/reset", "One.", options=system))["turns"]
    assert kept[0]["usage"] == kept[1]["usage"]
    assert kept[0]["usage"]["prompt_tokens"] > one


def test_saving_and_loading(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "a chat.json"
    out = chat("One.", f"/save {file}", "/reset", f"/load {file}", "/stats", "/quit", "Not this.")
    assert "loaded: 2 messages" in out
    assert "2 messages, 0 dropped" in out
    assert "Not this" not in out
    assert "cannot be written" in chat("One.", f"/save {tmp_path}/no/x", code=4)
    assert "cannot be read" in chat(f"/load {tmp_path}/no", code=2)


def test_stats_and_help(chat: Chat) -> None:
    out = chat("/help", "One.", "/stats")
    for name in "help adapters pin route reset undo again save load stats quit".split():
        assert f"\n/{name}" in f"\n{out}"
    assert re.search(r"answer \d+ tokens", out)
    assert '\n""" ... """' in out


def test_a_message_of_several_lines(chat: Chat) -> None:
    lines = (
        '"""Tom has',
        "  /apples",
        "",
        'three."""',
        '"""',
        "One.",
        '"""',
        '"""never ends',
        "Two.",
    )
    turns = json.loads(chat(*lines, options=("--json", "--adapters", "sums")))["turns"]
    said = [turn["prompt"] for turn in turns]
    assert said == ["Tom has\n  /apples\n\nthree.", "One.", "never ends\nTwo."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "no command /nothing"),
        ("/pin", "Write /pin NAME"),
        ("/pin nobody", "no adapter 'nobody'"),
        ("/pin sums=much", "weight of sums"),
        ("/reset now", "Write /reset"),
        ("/undo", "conversation is empty"),
        ("/again", "conversation is empty"),
    ],
)
def test_wrong_commands_end_a_script(chat: Chat, line: str, message: str) -> None:
    error = chat(line, "Hello.", code=2)
    assert message in error
    assert len(error.splitlines()) == 1


def test_two_slashes_begin_a_text(chat: Chat) -> None:
    texts = ("//etc is a folder.", "+etc is a folder.")
    turns = json.loads(chat("/reset", texts[0], "/reset", texts[1], options=("--json",)))["turns"]
    assert turns[0]["usage"]["prompt_tokens"] == turns[1]["usage"]["prompt_tokens"]


def test_a_full_context_drops_the_oldest_and_says_so(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"Turn {i}: " + "word " * 20 for i in range(5)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(tiny_bundle), "--adapters", "sums", "--max-new-tokens", "40"]) == 0
    assert re.search(r"the oldest \d+ messages were forgotten", capsys.readouterr().err)


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        import fcntl
        import pty
        import termios

        # Slow tokens, so that there is a middle of an answer.
        code = (
            "import sys, time\n"
            "from dlp_edge.cli.main import main\n"
            "from dlp_edge.runtime.engine.decoder import Decoder\n"
            "step = Decoder.step\n"
            "Decoder.step = lambda *a, **k: (time.sleep(0.05), step(*a, **k))[1]\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )

        def take_over() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's "&" has it ignored
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_over,
            env={**os.environ, "TERM": "xterm", **(environment or {})},
        )
        os.close(slave)
        self.shown = ""
        self._new = ""  # of what was shown, what no `until` has looked for

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, text: str) -> None:
        """Waits until the text is shown, after what the last call waited for."""
        assert self.shows(text, within=30), f"{text!r} was not shown in {self.shown!r}"
        self._new = self._new.partition(text)[2]

    def shows(self, text: str, within: float) -> bool:
        """Whether the text is shown within so many seconds, after what `until` waited for."""
        deadline = time.monotonic() + within
        while text not in self._new:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._master], [], [], left)[0] or not self._read():
                return False
        return True

    def _read(self) -> bool:
        try:
            shown = os.read(self._master, 4096).decode(errors="replace")
        except OSError:  # as Linux reports the end
            shown = ""
        self.shown += shown
        self._new += shown
        return bool(shown)

    def end(self) -> int:
        """Reads the rest; the exit code."""
        while select.select([self._master], [], [], 60)[0]:
            if not self._read():
                break
        else:
            self._process.kill()  # it waits for a key
        os.close(self._master)
        return self._process.wait(30)


@posix
def test_ctrl_c_stops_the_answer_and_not_the_program(tiny_bundle: Path) -> None:
    terminal = Terminal(["chat", str(tiny_bundle), "--adapters", "sums", "--max-new-tokens", "200"])
    terminal.until("> ")
    assert "/help lists the commands" in terminal.shown
    terminal.type("Tom has 3 apples.\n")
    terminal.until("│")
    time.sleep(0.3)
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.until("> ")
    # At the prompt: nothing to stop. Python's readline misses a signal between showing the prompt
    # and waiting for a key; so do users, and press again.
    for _ in range(20):
        terminal.type("\x03")
        if terminal.shows("ends the chat", within=1):
            break
    terminal.until("ends the chat")
    terminal.until("> ")
    terminal.type("/stats\n")
    terminal.until("2 messages, 0 dropped")
    terminal.until("cancelled")
    terminal.until("> ")
    terminal.type("/nothing\n")
    terminal.until("no command /nothing")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.shown


@pytest.mark.slow
@posix
@pytest.mark.parametrize("no_colour", [True, False])
def test_colour_on_a_terminal_only_where_it_is_wanted(tiny_bundle: Path, no_colour: bool) -> None:
    command = ["run", str(tiny_bundle), "Tom has 3 apples.", "--max-new-tokens", "9"]
    terminal = Terminal(command, {"NO_COLOR": "1" if no_colour else ""})
    assert terminal.end() == 0
    assert ("\x1b[36m" not in terminal.shown) == no_colour
    assert "loading: backbone" in terminal.shown
    assert "tokens" in terminal.shown
    quiet = Terminal([*command, "--quiet"])
    assert quiet.end() == 0
    assert "loading" not in quiet.shown
    assert "tokens" not in quiet.shown
    assert "│" in quiet.shown


@pytest.mark.slow
@posix
def test_the_model_does_not_steer_the_terminal(tiny_bundle: Path) -> None:
    """This backbone writes all bytes, control characters among them."""
    command = ["run", str(tiny_bundle), "Tom has 3 apples.", "--adapters", ""]
    command += ["--quiet", "--max-new-tokens", "30"]
    piped = subprocess.run(
        [sys.executable, "-m", "dlp_edge.cli.main", *command, "--json"], capture_output=True
    )
    assert any(ord(c) < 32 and c not in "\n\t" for c in json.loads(piped.stdout)["text"])
    terminal = Terminal(command, {"NO_COLOR": "1"})
    assert terminal.end() == 0
    assert not [c for c in terminal.shown if ord(c) < 32 and c not in "\r\n\t"]


@posix
def test_a_pasted_text_is_one_message(tiny_bundle: Path, tmp_path: Path) -> None:
    """As a terminal sends it: between the marks of a bracketed paste, which were asked for."""
    file = tmp_path / "chat.json"
    terminal = Terminal(["chat", str(tiny_bundle), "--adapters", "sums", "--max-new-tokens", "3"])
    terminal.until("\x1b[?2004h")
    terminal.until("> ")
    terminal.type("\x1b[200~Tom has\n\n/three apples.\x1b[201~")
    terminal.until("apples.")
    terminal.type("\n")
    terminal.until("\u2502")
    terminal.until("> ")
    terminal.type(f"/save {file}\n")
    terminal.until("saved")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    [said, _] = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert said["content"] == "Tom has\n\n/three apples."


@posix
def test_a_terminal_without_a_line_editor_takes_a_paste(tiny_bundle: Path, tmp_path: Path) -> None:
    """Lines that arrive at once are one message."""
    (tmp_path / "readline.py").write_text("raise ImportError")
    terminal = Terminal(
        ["chat", str(tiny_bundle), "--adapters", "sums", "--max-new-tokens", "3"],
        {"PYTHONPATH": str(tmp_path)},
    )
    terminal.until("> ")
    terminal.type("Tom has\nthree apples.\n")
    terminal.until("\u2502")
    terminal.until("> ")
    terminal.type("/stats\n")
    terminal.until("2 messages")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
