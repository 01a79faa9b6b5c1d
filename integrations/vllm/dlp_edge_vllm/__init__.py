"""Fused LoRA adapters for vLLM, by name."""
