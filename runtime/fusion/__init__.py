"""Fusing adapters for a sentence (eq. 6): three ways to fill the slots, one interface."""
