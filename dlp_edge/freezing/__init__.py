"""What PyInstaller has to know about dlp-edge; it finds this by the entry point `pyinstaller40`.

The other files of this folder are its hooks, each named after the module that it is for. Nothing
of them is imported by an application.
"""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """The folders with hooks: this one."""
    return [str(Path(__file__).parent)]
