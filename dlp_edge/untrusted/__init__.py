"""Readers for input that may be hostile: bounded in time and memory, typed errors."""
