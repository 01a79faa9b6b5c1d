"""Where downloads are kept."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from dlp_edge.errors import ResourceError


def cache_folder() -> Path:
    """DLP_EDGE_CACHE, or the platform's user cache; made if there is none.

    Raises:
        ResourceError: it cannot be made.
    """
    chosen = os.environ.get("DLP_EDGE_CACHE")
    folder = Path(chosen) if chosen else user_cache_path("dlp-edge", appauthor=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be created ({error.strerror})", "Set DLP_EDGE_CACHE to another place"
        ) from error
    return folder
