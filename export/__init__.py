"""Packaging time: a backbone, adapters and a router become one bundle (heavy dependencies)."""
