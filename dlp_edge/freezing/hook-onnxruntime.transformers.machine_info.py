"""onnxruntime may print what machine it is on, and only there asks torch about the GPU: reason
enough for PyInstaller to freeze all of torch and what it depends on, where that is installed."""

excludedimports = ["torch"]
