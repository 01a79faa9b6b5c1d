"""Readers for untrusted input: bounded time and memory, typed errors."""
