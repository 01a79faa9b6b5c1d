"""ONNX files read and written as protobuf bytes, without the onnx package."""
