"""Fetching a bundle from the hub needs nothing of what huggingface_hub can do with models: reason
enough for PyInstaller to freeze all of torch, where that is installed."""

excludedimports = ["torch", "tensorflow"]
