"""Renames, removals and locks that behave as on Windows, and systems without POSIX."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from dlp_edge import BundleError, ResourceError, Runtime
from dlp_edge.atomic import sharing
from dlp_edge.atomic.lock import locked
from dlp_edge.atomic.sharing import move, patiently
from dlp_edge.atomic.staging import replace_file, replace_folder, restore_folder, staged
from dlp_edge.bundle.bundle import Bundle, open_bundle
from dlp_edge.bundle.files import MANIFEST
from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.hub import fetch
from dlp_edge.hub.fetch import fetch_bundle
from dlp_edge.runtime.adapters.edit import add_skill, remove_skill
from dlp_edge.runtime.routing.policy import load_router
from tests.testing.hub_server import HubServer
from tests.testing.windows_files import HeldOpenError, windows_files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the real thing is there")


def add(bundle: Bundle, parrot: Path) -> Bundle:
    return add_skill(bundle, load_router(bundle), "parrot", parrot)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "PATIENCE", 0.1)


class TestHeldOpen:
    """Another program has a file open that is to be replaced."""

    def test_it_is_waited_for(self, tmp_path: Path) -> None:
        new, old = tmp_path / "new", tmp_path / "old"
        new.write_bytes(b"new")
        old.write_bytes(b"old")
        file = old.open("rb")
        threading.Timer(0.2, file.close).start()
        with windows_files():
            move(new, old)
        assert old.read_bytes() == b"new"

    def test_other_errors_are_raised_at_once(self, tmp_path: Path) -> None:
        begun = time.monotonic()
        with pytest.raises(FileNotFoundError):
            move(tmp_path / "none", tmp_path / "there")
        calls = []

        def refused() -> None:
            calls.append(1)
            raise PermissionError(13, "not yours")

        with pytest.raises(PermissionError):
            patiently(refused)
        assert len(calls) == 1
        assert time.monotonic() - begun < 1

    def test_a_manifest_that_is_being_read(self, bundle_copy: Path, parrot: Path) -> None:
        bundle = open_bundle(bundle_copy)
        file = (bundle_copy / MANIFEST).open("rb")
        threading.Timer(0.2, file.close).start()
        with windows_files():
            after = add(bundle, parrot)
        assert after == open_bundle(bundle_copy)
        verify_bundle(bundle_copy)

    @pytest.mark.usefixtures("impatient")
    def test_a_manifest_that_stays_open(self, bundle_copy: Path, parrot: Path) -> None:
        bundle = open_bundle(bundle_copy)
        before = {path.name for path in bundle_copy.iterdir()}
        in_use = pytest.raises(ResourceError, match="used by another process")
        with (bundle_copy / MANIFEST).open("rb"), windows_files(), in_use:
            add(bundle, parrot)
        assert {path.name for path in bundle_copy.iterdir()} == before
        assert open_bundle(bundle_copy) == bundle
        add(bundle, parrot)

    @pytest.mark.usefixtures("impatient")
    def test_old_files_that_stay_open_are_left(self, bundle_copy: Path, parrot: Path) -> None:
        """And the change after the next removes them."""
        bundle = open_bundle(bundle_copy)
        old = bundle_copy / "adapters.safetensors"
        with old.open("rb"), windows_files():
            bundle = add(bundle, parrot)
        assert old.exists()
        verify_bundle(bundle_copy)
        with windows_files():
            remove_skill(bundle, load_router(bundle), "parrot")
        assert not old.exists()

    def test_a_loaded_bundle_holds_no_file_open(self, bundle_copy: Path, parrot: Path) -> None:
        """Or it could be neither changed nor removed."""
        with Runtime(bundle_copy, threads=1) as runtime, windows_files():
            runtime.generate("Hello", max_new_tokens=3)
            runtime.add_adapter("parrot", parrot)
            runtime.remove_adapter("parrot")
            move(bundle_copy, bundle_copy.with_name("elsewhere"))
            assert runtime.generate("Hello", max_new_tokens=3).text is not None

    @pytest.mark.usefixtures("impatient")
    def test_a_session_that_is_open_elsewhere(self, tiny_bundle: Path, tmp_path: Path) -> None:
        path = tmp_path / "chat.json"
        with Runtime(tiny_bundle, threads=1, max_context=128) as runtime:
            chat = runtime.session()
            chat.save(path)
            before = path.read_bytes()
            chat.send("Hello", max_new_tokens=3)
            with path.open("rb"), windows_files(), pytest.raises(ResourceError):
                chat.save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.usefixtures("impatient")
    def test_a_file_is_replaced_or_as_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with path.open("rb"), windows_files(), pytest.raises(HeldOpenError):
            replace_file(path, b"new")
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


class TestFolders:
    """Without an exchange of two folders, and with files open in the old one."""

    @pytest.mark.usefixtures("impatient")
    def test_an_open_file_keeps_the_old_folder(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        target.mkdir()
        (target / "old").write_bytes(b"old")

        def replace() -> None:
            with staged(target, lambda folder: True) as folder:
                (folder / "new").write_bytes(b"new")

        with (target / "old").open("rb"), windows_files(), pytest.raises(ResourceError):
            replace()
        assert [path.name for path in target.iterdir()] == ["old"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_what_cannot_be_moved_brings_the_old_folder_back(self, tmp_path: Path) -> None:
        new, target = tmp_path / "new", tmp_path / "out"
        target.mkdir()
        (target / "old").write_bytes(b"old")
        with windows_files(), pytest.raises(FileNotFoundError):
            replace_folder(new, target)
        assert (target / "old").read_bytes() == b"old"

    def test_killed_between_two_renames(self, tmp_path: Path) -> None:
        (tmp_path / ".out.old").mkdir()
        restore_folder(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.fixture
    def web(self, tiny_bundle: Path, tmp_path: Path) -> HubServer:
        server = HubServer()
        server.repositories["some/one"] = {p.name: p.read_bytes() for p in tiny_bundle.iterdir()}
        return server

    @pytest.mark.usefixtures("impatient")
    def test_a_fetched_bundle_replaces_the_old_one_whole(
        self, web: HubServer, bundle_copy: Path, parrot: Path
    ) -> None:
        url = f"{web.url}/some/one/resolve/main"
        changed = add(open_bundle(bundle_copy), parrot)
        with windows_files():
            with (bundle_copy / "tokenizer.json").open("rb"), pytest.raises(ResourceError):
                fetch_bundle(url, bundle_copy)
            assert open_bundle(bundle_copy) == changed
            verify_bundle(bundle_copy)
            fetch_bundle(url, bundle_copy)
        assert len(open_bundle(bundle_copy).manifest.adapters) == 3
        assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]
        web.close()

    def test_a_fetch_that_was_killed_between_two_renames(
        self, web: HubServer, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle_copy.rename(bundle_copy.with_name(f".{bundle_copy.name}.old"))

        def broken_off(*_: object) -> None:
            raise BundleError("broken off", "")

        with monkeypatch.context() as patch:
            patch.setattr(fetch, "_fetch_files", broken_off)
            patch.setattr(fetch, "_parse", broken_off)
            with pytest.raises(BundleError, match="broken off"):
                fetch_bundle(f"{web.url}/some/one/resolve/main", bundle_copy)
        open_bundle(bundle_copy)
        web.close()


class TestLocks:
    def is_locked(self, path: Path) -> bool:
        try:
            with locked(path):
                return False
        except ResourceError as error:
            return "another process" in error.cause

    def test_one_folder_by_two_spellings(self, tmp_path: Path) -> None:
        """Windows and macOS ignore case, macOS how an umlaut is composed."""
        with locked(tmp_path / "bündel"):
            assert self.is_locked(tmp_path / "BÜNDEL")
            assert self.is_locked(tmp_path / "bu\u0308ndel")
            assert not self.is_locked(tmp_path / "bundel")

    def test_a_name_that_is_no_text(self, tmp_path: Path) -> None:
        with locked(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))):
            pass

    def test_without_the_system_s_locks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where there is neither fcntl nor msvcrt, a file is the lock."""
        monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
        with locked(tmp_path / "a"):
            assert self.is_locked(tmp_path / "a")
            assert not self.is_locked(tmp_path / "b")
        assert not self.is_locked(tmp_path / "a")


WITHOUT_POSIX = """
import os, signal, socket, sys
import numpy, onnxruntime, psutil, tokenizers  # which ask for what their own system has
for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "syslog"):
    sys.modules[name] = None
for module, names in {
    os: "fork forkpty O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_DIRECTORY O_SYNC sched_getaffinity getuid"
    " geteuid getgid getpgid setsid killpg mkfifo fchmod fchown chown openpty pread sysconf"
    " register_at_fork posix_spawn getloadavg uname statvfs".split(),
    signal: "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGPIPE SIGXFSZ pthread_sigmask setitimer".split(),
    socket: ["AF_UNIX"],
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
from dlp_edge.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_system_without_posix(bundle_copy: Path, parrot: Path) -> None:
    """The command line does not need what Windows lacks."""
    lines = [
        ["inspect", str(bundle_copy)],
        ["verify", str(bundle_copy)],
        ["add", str(bundle_copy), f"parrot={parrot}"],
        ["route", str(bundle_copy), "How many apples?"],
        ["run", str(bundle_copy), "Hello", "--max-new-tokens", "3"],
        ["chat", str(bundle_copy), "--max-new-tokens", "3"],
        ["remove", str(bundle_copy), "parrot"],
    ]
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_POSIX, *line],
            input="Hello\n",
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "DLP_EDGE_TRACEBACK": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
