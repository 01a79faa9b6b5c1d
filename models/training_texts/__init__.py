"""Texts that a router is trained on beside the tasks: out-of-scope ones, and augmentation."""
