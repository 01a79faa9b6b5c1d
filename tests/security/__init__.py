"""Hostile input, faults of disk and memory, signatures, fuzzing."""
