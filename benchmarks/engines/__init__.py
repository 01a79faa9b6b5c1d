"""One engine a file, all behind the same small interface (`interface.py`).

A module imports its engine only, and nothing of dlp-edge unless that is the engine: each runs in a
Python environment of its own.
"""
