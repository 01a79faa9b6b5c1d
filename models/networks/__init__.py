"""The router's architectures."""
