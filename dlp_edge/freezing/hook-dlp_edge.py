"""`from dlp_edge import Runtime` imports the module that has it by its name, which cannot be seen
in the code."""

from pathlib import Path

import dlp_edge

if not Path(dlp_edge.__file__).with_name("runtime").is_dir():
    raise SystemExit(
        "PyInstaller cannot follow an editable install of dlp-edge, whose packages lie elsewhere. "
        "Install it with `pip install .`, and freeze outside the checkout."
    )
hiddenimports = sorted(dlp_edge._NAMES)
