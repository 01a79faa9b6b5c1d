"""The library with our own operators, which nothing imports."""

from dlp_edge.runtime.engine.operators import library_file

found = library_file()
binaries = [(str(found), "dlp_edge/runtime/engine")] if found else []
