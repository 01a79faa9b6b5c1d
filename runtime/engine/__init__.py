"""The backbone on a device: onnxruntime sessions, KV cache, prefill and decode of token ids."""
