"""Links, pipes and devices planted where files are written and read."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from dlp_edge import ResourceError, Runtime, UsageError
from dlp_edge.atomic.staging import replace_file, write_file
from dlp_edge.errors import RouterError
from dlp_edge.tasks.samples import read_samples

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def test_a_saved_session_is_private_and_follows_no_link(
    tiny_bundle: Path, tmp_path: Path, victim: Path
) -> None:
    target = tmp_path / "chat.json"
    (tmp_path / f"chat.json.{os.getpid()}.new").symlink_to(victim)
    target.symlink_to(victim)
    with Runtime(tiny_bundle, threads=1) as runtime:
        runtime.session(system="Be brief").save(target)
        assert runtime.load_session(target).messages[0]["content"] == "Be brief"
    assert victim.read_text("ascii") == "precious"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert not list(tmp_path.glob(".chat.json*"))


def test_a_failed_replacement_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="irectory"):
        replace_file(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_written_file_replaces_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "new").symlink_to(victim)
    write_file(tmp_path / "new", b"x")
    assert victim.read_text("ascii") == "precious"
    assert (tmp_path / "new").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["adapters.1.safetensors", "manifest.json.next"])
def test_links_in_a_bundle_are_not_written_through(
    bundle_copy: Path, parrot: Path, victim: Path, name: str
) -> None:
    """These names are allowed beside a bundle's files."""
    (bundle_copy / name).symlink_to(victim)
    with Runtime(bundle_copy, threads=1) as runtime:
        runtime.add_adapter("parrot", parrot, examples=[f"Say {i} again" for i in range(12)])
    assert victim.read_text("ascii") == "precious"


def test_a_link_in_the_place_of_a_lock(tmp_path: Path, victim: Path) -> None:
    from dlp_edge.atomic.lock import locked

    with locked(tmp_path / "target"):
        folder = Path(tempfile.gettempdir())
        lock = max(folder.glob("dlp-edge-*.lock"), key=lambda path: path.stat().st_mtime_ns)
    lock.unlink(missing_ok=True)
    lock.symlink_to(victim)
    try:
        with pytest.raises(ResourceError, match="is a link"), locked(tmp_path / "target"):
            pass
    finally:
        lock.unlink()
    assert victim.read_text("ascii") == "precious"


def test_pipes_and_devices_are_no_sessions_and_no_samples(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    paths = [tmp_path / "pipe", Path("/dev/zero"), Path("/dev/stdin"), tmp_path, tmp_path / "loop"]
    with Runtime(tiny_bundle, threads=1) as runtime:
        for path in paths:
            with pytest.raises(UsageError, match="cannot be read"):
                runtime.load_session(path)
            with pytest.raises(RouterError, match="cannot be read"):
                read_samples(path)


@pytest.mark.parametrize("dropped", [-(10**30), -1, 10**30, True, 1.5, "1"])
def test_a_session_that_dropped_nonsense(
    tiny_bundle: Path, tmp_path: Path, dropped: object
) -> None:
    with Runtime(tiny_bundle, threads=1) as runtime:
        runtime.session().save(tmp_path / "chat.json")
        content = json.loads((tmp_path / "chat.json").read_text())
        (tmp_path / "chat.json").write_text(json.dumps({**content, "dropped": dropped}))
        with pytest.raises(UsageError, match="damaged"):
            runtime.load_session(tmp_path / "chat.json")
