"""Writing that fails or dies at every single step: what was there before stays whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Runtime
from dlp_edge.atomic import staging
from dlp_edge.atomic.staging import staged
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.files import MANIFEST
from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.errors import DlpEdgeError, ResourceError
from dlp_edge.runtime.adapters.edit import add_skill, remove_skill
from dlp_edge.runtime.routing.policy import load_router
from tests.testing.faults import cut_writes, failing, killed, points_of, watched
from tests.testing.parrot import PARROT
from tests.testing.paths import ROOT

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
Content = dict[str, str]
# A real export takes a second and more, so only some of its points are tried here; with 1 all.
EVERY = int(os.environ.get("DLP_EDGE_FAULTS_EVERY", "0"))
FAIL_EVERY, KILL_EVERY = EVERY or 5, EVERY or 20


def content(folder: Path) -> Content:
    """name -> SHA-256 of all files of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def manifest_of(folder: Path) -> str:
    return (folder / MANIFEST).read_text(encoding="utf-8")


def answers(folder: Path) -> None:
    with Runtime(folder, max_context=128) as runtime:
        assert runtime.generate("Hello", adapters={}, max_new_tokens=3).text


def next_export_clears(target: Path) -> None:
    """The next export to the target, which fails, leaves the target and nothing else, but for what
    a killed export had computed, which lets the same command resume."""
    with pytest.raises(KeyError), staged(target, lambda folder: True):
        raise KeyError
    work = f".{target.name}.work"
    assert [p.name for p in target.parent.iterdir() if p.name != work] == [target.name]


@needs_fork
@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_replacing_a_folder(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two folders cannot be exchanged in one step: there the old one is put back by
    the next call."""
    if not exchanges:
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    target = tmp_path / "here" / "out"
    states = []

    def work() -> None:
        with staged(target, lambda folder: True) as made:
            (made / "a").write_text("new")

    while not states or states[-1] is not None:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.mkdir(parents=True)
        (target / "a").write_text("old")
        (target / "b").write_text("old too")
        if not killed(target.parent, len(states), work):
            states.append(None)
            break
        if exchanges:
            assert target.exists()
        next_export_clears(target)
        assert len(list(target.iterdir())) in (1, 2)
        states.append((target / "a").read_text() + str(len(list(target.iterdir()))))
    assert set(states) == {"old2", "new1", None}


class TestExport:
    """An export over an old bundle."""

    @pytest.fixture
    def export(self, tiny_backbone: Path, tiny_adapters: dict[str, Path], tiny_router: Path) -> Any:
        from dlp_edge.export.pipeline import export_bundle

        def work(out: Path) -> None:
            some = {name: tiny_adapters[name] for name in sorted(tiny_adapters)}
            export_bundle(str(tiny_backbone), some, tiny_router, out, quantisation="fp32")

        return work

    @pytest.mark.slow
    def test_dying_at_every_point(self, export: Callable[[Path], None], bundle_copy: Path) -> None:
        """What a process that is killed leaves is what lies on the disk at that moment: so one
        export is looked at before each of its operations."""
        parent = bundle_copy.parent
        old = content(bundle_copy)
        seen = parent.with_name(parent.name + "-seen")
        count = 0

        def look(point: str) -> None:
            nonlocal count
            count += 1
            shutil.copytree(parent, seen)
            assert [path.name for path in seen.iterdir() if not path.name.startswith(".")] == [
                bundle_copy.name
            ], point
            now = content(seen / bundle_copy.name)
            assert now == old or set(now) == set(old), point
            verify_bundle(seen / bundle_copy.name)
            states.append(now)
            next_export_clears(seen / bundle_copy.name)
            shutil.rmtree(seen)

        states: list[Content] = []
        with watched(parent, look):
            export(bundle_copy)
        assert count > 50
        new = content(bundle_copy)
        assert old != new
        assert all(state in (old, new) for state in states)
        assert states == sorted(states, key=lambda state: state == new)  # once new, always new
        answers(bundle_copy)

    @pytest.mark.slow
    def test_a_full_disk_at_every_point(
        self, export: Callable[[Path], None], bundle_copy: Path
    ) -> None:
        before = content(bundle_copy)
        failed = 0
        for at in range(0, 1000, FAIL_EVERY):
            with failing(bundle_copy.parent, at) as points:
                try:
                    export(bundle_copy)
                except ResourceError:
                    failed += 1
                    assert content(bundle_copy) == before, points[at]
                else:
                    verify_bundle(bundle_copy)
                    before = content(bundle_copy)
            if len(points) <= at:
                break
            next_export_clears(bundle_copy)
        assert failed > 30 // FAIL_EVERY
        answers(bundle_copy)

    @pytest.mark.slow
    @needs_fork
    def test_killed_for_real(
        self,
        tiny_backbone: Path,
        tiny_adapters: dict[str, Path],
        tiny_router: Path,
        bundle_copy: Path,
    ) -> None:
        """In processes of their own, at every KILL_EVERY-th point."""
        arguments = {
            "backbone": str(tiny_backbone),
            "adapters": {name: str(folder) for name, folder in tiny_adapters.items()},
            "router": str(tiny_router),
            "out": str(bundle_copy),
            "every": KILL_EVERY,
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.testing.kill_exports"],
            cwd=ROOT,
            input=json.dumps(arguments),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["kills"] > 50 // KILL_EVERY
        assert result["broken"] == []
        answers(bundle_copy)

    @pytest.mark.slow
    def test_two_at_once(
        self, tiny_backbone: Path, tiny_adapters: dict[str, Path], bundle_copy: Path
    ) -> None:
        """One wins, the other says so, and no mixture of them appears."""
        command = [sys.executable, "-m", "dlp_edge.cli.main", "export", "-o", str(bundle_copy)]
        command += ["--backbone", str(tiny_backbone), "--quant", "fp32", "--quiet"]
        own = [["--adapter", f"{name}={tiny_adapters[name]}"] for name in ("sums", "email")]
        both = [
            subprocess.Popen(command + adapter, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            for adapter in own
        ]
        errors = [process.communicate()[1].decode() for process in both]
        codes = [process.returncode for process in both]
        assert 0 in codes
        for code, error in zip(codes, errors, strict=True):
            assert code == 0 or (code == 4 and "another process is writing" in error), error
        verify_bundle(bundle_copy)
        [adapter] = open_bundle(bundle_copy).manifest.adapters
        winners = [name for name, code in zip(("sums", "email"), codes, strict=True) if code == 0]
        assert adapter.name in winners
        assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]


EDITIONS: dict[str, Callable[[Path, Path], object]] = {
    "add": lambda folder, peft: add_skill(
        open_bundle(folder), load_router(open_bundle(folder)), "parrot", peft, PARROT
    ),
    "remove": lambda folder, _: remove_skill(
        open_bundle(folder), load_router(open_bundle(folder)), "sql"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", EDITIONS)
class TestEdition:
    """An adapter that is added or removed."""

    def test_a_full_disk_at_every_point(
        self,
        change: str,
        bundle_copy: Path,
        tiny_bundle: Path,
        parrot: Path,
    ) -> None:
        def work() -> None:
            EDITIONS[change](bundle_copy, parrot)

        count = len(points_of(bundle_copy.parent, work))
        new = manifest_of(bundle_copy)
        failed = 0
        for at in range(count):
            shutil.rmtree(bundle_copy)
            shutil.copytree(tiny_bundle, bundle_copy)
            with failing(bundle_copy.parent, at):
                try:
                    work()
                except ResourceError:
                    failed += 1
                    assert content(bundle_copy) == content(tiny_bundle)
                else:
                    assert manifest_of(bundle_copy) == new
            verify_bundle(bundle_copy)
        assert failed >= 5

    @needs_fork
    def test_dying_at_every_point(
        self,
        change: str,
        bundle_copy: Path,
        tiny_bundle: Path,
        parrot: Path,
    ) -> None:
        """The bundle is the old edition or the new one, whole, and the next change clears up."""
        old = manifest_of(tiny_bundle)
        states = []
        while killed(
            bundle_copy.parent, len(states), lambda: EDITIONS[change](bundle_copy, parrot)
        ):
            verify_bundle(bundle_copy)
            states.append(manifest_of(bundle_copy) == old)
            bundle = open_bundle(bundle_copy)
            after = remove_skill(bundle, load_router(bundle), "email")
            assert set(content(bundle_copy)) == {*after.manifest.files, MANIFEST}
            shutil.rmtree(bundle_copy)
            shutil.copytree(tiny_bundle, bundle_copy)
        assert len(states) > 8
        assert states == sorted(states, reverse=True)  # once new, always new
        assert {True, False} == set(states)

    @needs_fork
    @pytest.mark.parametrize("kill", [False, True])
    def test_files_cut_short(
        self,
        change: str,
        kill: bool,
        bundle_copy: Path,
        tiny_bundle: Path,
        parrot: Path,
    ) -> None:
        """Every file of the new edition ends in the middle, at its first and at its last byte."""

        def work() -> None:
            EDITIONS[change](bundle_copy, parrot)

        work()
        new = {p.name: p.stat().st_size for p in bundle_copy.iterdir()}
        same = {p.name for p in tiny_bundle.iterdir()} - {MANIFEST}
        written = [size for name, size in new.items() if name not in same]
        assert len(written) == 3
        for size in sorted({cut for n in written for cut in (0, n // 2, n - 1)}):
            shutil.rmtree(bundle_copy)
            shutil.copytree(tiny_bundle, bundle_copy)
            status = cut_writes(size, work, kill)
            if kill and status is None:
                verify_bundle(bundle_copy)
                assert manifest_of(bundle_copy) == manifest_of(tiny_bundle)
            elif status == ResourceError.exit_code:
                assert content(bundle_copy) == content(tiny_bundle)
            else:
                assert status == 0
                assert size >= max(written) - 1


class TestSession:
    """A conversation that is saved over an older one."""

    @needs_fork
    def test_saving_that_fails_or_dies(self, tiny_bundle: Path, tmp_path: Path) -> None:
        path = tmp_path / "chat.json"
        with Runtime(tiny_bundle, max_context=256, threads=1) as runtime:
            chat = runtime.session(system="Old.")
            chat.save(path)
            old = path.read_bytes()
            chat.send("Hello", adapters={}, max_new_tokens=9)
            count = len(points_of(tmp_path, lambda: chat.save(path)))
            new = path.read_bytes()
            for at in range(count):
                path.write_bytes(old)
                assert killed(tmp_path, at, lambda: chat.save(path))
                assert path.read_bytes() in (old, new)
                path.write_bytes(old)
                with failing(tmp_path, at):
                    try:
                        chat.save(path)
                    except ResourceError:
                        assert path.read_bytes() == old
                    else:
                        assert path.read_bytes() == new
                runtime.load_session(path)
            for kill in (False, True):
                path.write_bytes(old)
                status = cut_writes(len(old), lambda: chat.save(path), kill)
                assert status == (None if kill else ResourceError.exit_code)
                assert path.read_bytes() == old
        assert count >= 4


class TestRouterFolder:
    """A router that is trained into the folder of an older one."""

    @needs_fork
    def test_writing_that_fails_or_dies(
        self,
        tiny_tasks: Path,
        tiny_router: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from dlp_edge.models import training
        from dlp_edge.models.router_folder import is_router_folder, read_router, write_router

        written: list[Any] = []  # what a real training writes

        def write(*arguments: Any) -> None:
            written.append(arguments)
            write_router(*arguments)

        monkeypatch.setattr(training, "write_router", write)
        training.train_router(tiny_tasks, tmp_path / "first", seed=1)
        [(_, report, weights, head, pieces, splitter)] = written
        assert splitter is not None
        halves = {name: value.half() for name, value in weights.items()}  # no threads after a fork
        out = tmp_path / "here" / "router"
        shutil.copytree(tiny_router, out)

        def work() -> None:
            with staged(out, is_router_folder) as folder:
                write_router(folder, report, halves, head, pieces, splitter.half())

        old = content(out)
        count = len(points_of(out.parent, work))
        new = content(out)
        for at in range(count):
            for way in ("fail", "kill"):
                shutil.rmtree(out)
                shutil.copytree(tiny_router, out)
                if way == "kill":
                    assert killed(out.parent, at, work)
                else:
                    with failing(out.parent, at):
                        try:
                            work()
                        except DlpEdgeError:
                            assert content(out) == old
                assert content(out) in (old, new)
                next_export_clears(out)
        read_router(out)
        assert count > 15
