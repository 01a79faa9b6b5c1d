"""The folder of fusions: each is written once, under the hash of what it is made of.

Nothing in it is ever removed: vLLM reads an evicted adapter again, and its engine dies if the
folder is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from dlp_edge_vllm.fuse import CONFIG, WEIGHTS, fuse, read_skill
from dlp_edge_vllm.names import GRID, format_name, parse

FORMAT = "1"  # of what is written; part of the hash
NOTE = "fusion.json"  # what a folder holds, for people
Stamp = tuple[int, int]


class FusionStore:
    """Fusions of the skills in a folder.

    Args:
        skills: a folder of PEFT folders.
        folder: where fusions are written; it is made if it is missing.
        most: fusions that it may hold, so that clients cannot fill the disk.
        max_rank: the largest rank of a fusion.

    Raises:
        ValueError: there is no skill.
    """

    def __init__(self, skills: Path, folder: Path, most: int, max_rank: int) -> None:
        self._skills = skills
        self._folder = folder
        self._most = most
        self._max_rank = max_rank
        self._lock = threading.Lock()
        self._hashes: dict[str, tuple[Stamp, str]] = {}
        self.names = frozenset(path.parent.name for path in skills.glob(f"*/{WEIGHTS}"))
        if not self.names:
            raise ValueError(f"{skills} holds no PEFT folders")
        self._ranks = {name: _rank_of(skills / name) for name in self.names}
        folder.mkdir(parents=True, exist_ok=True)

    def folder_of(self, name: str) -> Path | None:
        """The PEFT folder of a fusion, which is written if it is new; None if the name is no
        fusion's, or too large a one's, or there is no room for another.

        Raises:
            ValueError, OSError: a skill cannot be read, or the fusion cannot be written.
        """
        weights = parse(name, self.names)
        if weights is None or sum(self._ranks[skill] for skill in weights) > self._max_rank:
            return None
        if name in self.names:
            return self._skills / name
        target = self._folder / self._key(weights)
        if target.is_dir():
            return target
        with self._lock:
            if not target.is_dir():
                if sum(1 for _ in self._folder.glob("[!.]*")) >= self._most:
                    return None
                self._write(weights, target)
        return target

    def _key(self, weights: Mapping[str, int]) -> str:
        """The hash of the name and of the skills' bytes: another skill of the same name makes
        another folder."""
        digest = hashlib.sha256(FORMAT.encode())
        for skill, steps in sorted(weights.items()):
            digest.update(f"\n{skill} {steps} {self._hash(skill)}".encode())
        return digest.hexdigest()[:40]

    def _hash(self, skill: str) -> str:
        files = [self._skills / skill / name for name in (CONFIG, WEIGHTS)]
        stats = [path.stat() for path in files]
        stamp = (max(each.st_mtime_ns for each in stats), sum(each.st_size for each in stats))
        known = self._hashes.get(skill)
        if known is None or known[0] != stamp:
            digest = hashlib.sha256()
            for path in files:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            known = self._hashes[skill] = (stamp, digest.hexdigest())
        return known[1]

    def _write(self, weights: Mapping[str, int], target: Path) -> None:
        """Writes beside the target, syncs, and renames."""
        files = fuse({self._skills / skill: steps / GRID for skill, steps in weights.items()})
        note = {"name": format_name(dict(weights)), "skills": {s: self._hash(s) for s in weights}}
        files[NOTE] = json.dumps(note, indent=1).encode()
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder))
        try:
            work.chmod(0o755)
            for name, data in files.items():
                with (work / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            work.rename(target)
        except OSError:
            if not target.is_dir():  # another server was not faster
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _rank_of(folder: Path) -> int:
    _, pairs = read_skill(folder)
    return max(len(pair.a) for pair in pairs.values())
