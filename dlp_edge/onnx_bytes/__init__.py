"""Reads and writes ONNX files as protobuf bytes, without the onnx package."""
