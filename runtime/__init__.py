"""Run time: loads a bundle and generates text (ONNX Runtime and numpy, no torch)."""
